"""Two processes under torchrun do what one does: DDP, fully_shard, checkpoints."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from joint_training import OPTIONS, SEED, Batch, N, make_batches, make_mae, make_optimizer, resume, save, train
from support import small_reference
from torch import Tensor, nn

import maefast
from maefast.testing.errors import assert_close_to_float64

TESTS = Path(__file__).parent
WORKERS = TESTS / "distributed"
WORLD = 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # one process saves and loads without a group
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]


def torchrun(script: str, *arguments: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    path = os.pathsep.join([str(Path(maefast.__file__).parent.parent), str(TESTS)])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command += [WORKERS / script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    results = tmp_path_factory.mktemp("ddp") / "losses.pt"
    torchrun("ddp.py", results)
    return torch.load(results)


@pytest.fixture(scope="module")
def checkpoint_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory, checkpoint_of_two: Path) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("fsdp")
    model = make_mae()
    optimizer = make_optimizer(model)
    train(model, optimizer, make_batches()[:2])
    save(model, optimizer, folder / "one")
    torchrun("fsdp.py", folder / "results.pt", folder / "one", checkpoint_of_two)
    return torch.load(folder / "results.pt")


def check(got: Tensor, batches: Sequence[Batch], cast: bool = False, first: int = 0) -> None:
    """Hold the losses of the steps from `first` on to the error rule, beside one process.

    The ranks sum the same terms in another order.
    """
    reference = small_reference(**OPTIONS)
    exact = copy.deepcopy(reference).double()
    eager = train(reference, make_optimizer(reference), batches, cast=cast)
    truth = train(exact, make_optimizer(exact), [(imgs.double(), noise) for imgs, noise in batches])
    assert len(truth) == 4
    assert truth.diff().abs().min() > 1e-2  # the steps matter
    assert_close_to_float64("losses", got, eager[first:], truth[first:])


def joined(batches: Sequence[Batch]) -> list[Batch]:
    """Each two micro batches as one batch."""
    return [tuple(map(torch.cat, zip(*batches[i : i + 2], strict=True))) for i in range(0, len(batches), 2)]


@pytest.mark.parametrize("name", ["pred", "no_pred"])
def test_ddp_is_one_process_with_the_joint_batch(ddp, name):
    check(ddp[name], make_batches()[:4])


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_accumulate(request, wrapper):
    """Two micro batches without synchronisation between them are one batch."""
    check(request.getfixturevalue(wrapper)["accumulated"], joined(make_batches()))


def test_ranks_draw_masks_of_their_own(ddp):
    """Seeded with seed + rank, they draw what torch.rand draws from those seeds."""
    ranks = [torch.Generator().manual_seed(SEED + rank) for rank in range(WORLD)]
    batches = [(imgs, torch.cat([torch.rand(N // WORLD, 24, generator=r) for r in ranks])) for imgs, _ in make_batches()[:4]]
    assert not torch.equal(*batches[0][1].chunk(2))
    check(ddp["own_masks"], batches)


FSDP = {name: {} for name in ("pred", "no_pred", "every_module", "every_module_no_pred", "checkpointed")}
FSDP |= {"autocast": {"cast": True}, "from_one": {"first": 2}}  # the latter resumes a checkpoint of one process


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_is_one_process_with_the_joint_batch(fsdp, name):
    check(fsdp[name], make_batches()[:4], **FSDP[name])


def test_one_process_goes_on_from_a_checkpoint_of_two(fsdp, checkpoint_of_two):
    model = make_mae()
    optimizer = make_optimizer(model)
    resume(model, optimizer, checkpoint_of_two)
    check(train(model, optimizer, make_batches()[2:4]), make_batches()[:4], first=2)


def against_reference(got: Tensor, outputs: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    reference = small_reference(**OPTIONS)
    exact = copy.deepcopy(reference).double()
    imgs, noise = make_batches()[0]
    with torch.no_grad():
        truth = outputs(exact, imgs.double(), noise)
        reference, imgs = reference.to(got.dtype), imgs.to(got.dtype)
        assert_close_to_float64("outputs", got, outputs(reference, imgs, noise), truth)


def test_encode_of_a_sharded_model(fsdp):
    in_order = torch.linspace(0, 1, 24).expand(N, -1)
    against_reference(fsdp["encode"], lambda model, imgs, noise: model.forward_encoder(imgs, 0.0, in_order)[0])


def test_fsdp_in_bf16(fsdp):
    assert fsdp["bf16"].dtype == torch.bfloat16
    against_reference(fsdp["bf16"], lambda model, imgs, noise: model(imgs, noise=noise).pred)
