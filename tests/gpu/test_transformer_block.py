"""transformer_block on a GPU: the error rule at the widths of MAEs, streams, devices, no memory."""

import copy
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from support import assert_equal, assert_results, images_for, noise_for, small_mae
from torch import Tensor, nn

import maefast
from maefast import _library, kernels, ops
from maefast.blocks import Block, Route
from maefast.ops import BlockWeights
from maefast.ops._tokens import RepeatedTokens
from maefast.train.optim import adamw
from maefast.train.step import training_step

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not _library.HAS_CUDA or not kernels.HAS_TRITON,
    reason="needs a GPU, Triton and a build with CUDA kernels",
)

DEVICE = "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# D, heads, T: the encoders of ViT-B, -L and -H, the decoder of 16 x 16 and of 14 x 14 patches
SIZES = [(768, 12, 50), (1024, 16, 50), (1280, 16, 65), (512, 16, 197), (512, 16, 257)]
CASES = [(size, pending, BF16) for size in SIZES for pending in (True, False)] + [(size, True, F16) for size in SIZES[::3]]
N = 6


def block_of(D: int, heads: int) -> Block:
    """Every parameter random: none is left at the zeros and ones of a fresh block."""
    block = Block(D, heads, 4.0, partial(nn.LayerNorm, eps=1e-6), attn_backend="native")
    for name, p in block.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.1 if p.dim() == 1 else D**-0.5)
    return block.to(DEVICE)


def run(block: Block, x: Tensor, pending: Tensor | None, dy: Tensor, dtype: torch.dtype, attention: str) -> dict[str, Tensor]:
    """Return the sum of the results and every gradient."""
    leaves = {"x": x, "pending": pending} if pending is not None else {"x": x}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    weights = BlockWeights(*block.parameters())
    with torch.autocast(DEVICE, dtype):
        out = ops.transformer_block(leaves["x"], leaves.get("pending"), weights, block.attn.num_heads, attention=attention)
    assert (type(out[0].grad_fn).__name__ == "_TransformerBlockBackward") == (attention == "native")
    y = out[0] + out[1]
    named = leaves | weights._asdict()
    grads = torch.autograd.grad(y, list(named.values()), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(named, grads, strict=True))


@pytest.mark.parametrize(("size", "pending", "dtype"), CASES, ids=str)
def test_sizes(size, pending, dtype):
    """Results within the error rule, with the same bits in two runs."""
    D, heads, T = size
    block = block_of(D, heads)
    x, dy = (torch.randn(N, T, D, device=DEVICE) for _ in range(2))
    branch = torch.randn(N, T, D, device=DEVICE).to(dtype) if pending else None
    got, again = (run(block, x, branch, dy, dtype, "native") for _ in range(2))
    assert_equal(got, again)
    with maefast.backend("eager"):
        eager = run(block, x, branch, dy, dtype, "auto")
        wide = branch if branch is None else branch.double()
        exact = run(copy.deepcopy(block).double(), x.double(), wide, dy, dtype, "auto")
    assert_results([(got, [eager], exact)])


@pytest.mark.parametrize(("L", "K", "D", "dtype"), [(196, 49, 512, BF16), (196, 49, 512, F16), (256, 64, 512, BF16)])
def test_repeated_tokens(L, K, D, dtype):
    """What `repeated` gives is what every token gives, by the error rule."""
    block, ids = block_of(D, 16), torch.rand(N, L, device=DEVICE).argsort(dim=1)
    given = {"x": torch.randn(N, 1 + K, D, device=DEVICE), "mask_token": torch.randn(1, 1, D, device=DEVICE)}
    positions, dy = (torch.randn(n, 1 + L, D, device=DEVICE) for n in (1, N))

    def results(block: Block, wide: torch.dtype, once: bool, attention: str) -> dict[str, Tensor]:
        leaves = {name: t.to(wide).requires_grad_() for name, t in given.items()}
        tokens = leaves["x"], ids, leaves["mask_token"], positions.to(wide)
        weights = BlockWeights(*block.parameters())
        with torch.autocast(DEVICE, dtype):
            repeated = RepeatedTokens.of(*tokens) if once else None
            whole = ops.unshuffle(*tokens)
            stream, branch = ops.transformer_block(whole, None, weights, 16, repeated=repeated, attention=attention)
        assert (type(stream.grad_fn).__name__ == "_TransformerBlockBackward") == once
        y = stream + branch
        named = leaves | weights._asdict()
        return {"y": y.detach()} | dict(zip(named, torch.autograd.grad(y, list(named.values()), dy.to(y.dtype)), strict=True))

    got = results(block, F32, once=True, attention="native")
    with maefast.backend("eager"):
        eager = results(block, F32, once=False, attention="auto")
        exact = results(copy.deepcopy(block).double(), torch.float64, once=False, attention="auto")
    assert_results([(got, [eager], exact)])


def fused_mae(seed: int = 0) -> maefast.MAE:
    """A small model whose blocks are one op each under autocast."""
    sizes = {"embed_dim": 128, "num_heads": 2, "decoder_embed_dim": 64, "decoder_num_heads": 2}
    return small_mae(seed=seed, attn_backend="native", **sizes).to(DEVICE)


def steps(model: nn.Module, count: int = 3) -> list[Tensor]:
    """Return the weights after some steps."""
    device = next(model.parameters()).device
    optimizer = adamw(model, 0.01, backend="torch")
    imgs, noise = images_for(model).to(device), noise_for(model).to(device)
    for _ in range(count):
        training_step(model, optimizer, imgs, noise=noise, autocast=BF16, return_pred=False)
    return [p.detach() for p in model.parameters()]


def test_two_models_on_two_streams():
    """Their steps run at the same time and give what one after the other gives."""
    expected = [steps(fused_mae(seed)) for seed in range(2)]
    models = [fused_mae(seed) for seed in range(2)]
    with torch.autocast(DEVICE, BF16):
        assert models[0].blocks[0].route(torch.device(DEVICE), F32, tokens=5)[0] is Route.FUSED
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    got = []
    for stream, model in zip(streams, models, strict=True):
        with torch.cuda.stream(stream):
            got.append(steps(model))
    torch.cuda.synchronize()
    assert_equal(got, expected)


def test_a_model_moved_between_devices():
    """On the CPU again it computes what it did, and on the GPU again, too."""
    model = fused_mae()
    imgs, noise = images_for(model), noise_for(model)

    def loss(device: str) -> Tensor:
        model.to(device)
        with torch.no_grad(), torch.autocast(device, BF16):
            return model(imgs.to(device), noise=noise.to(device)).loss

    there_and_back = [loss(device) for device in ("cpu", DEVICE, "cpu", DEVICE)]
    assert_equal(there_and_back[:2], there_and_back[2:])
    torch.testing.assert_close(there_and_back[1].cpu(), there_and_back[0], rtol=1e-2, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    """Steps on the second GPU while the first is the current one."""
    first, second = steps(fused_mae()), steps(fused_mae().to("cuda:1"))
    assert_equal([p.cpu() for p in second], [p.cpu() for p in first])


def test_a_fork_after_cuda():
    """The child is told what to do; the parent goes on."""
    model = small_mae().to(DEVICE)
    imgs = images_for(model).to(DEVICE)
    before = model(imgs, noise=noise_for(model).to(DEVICE)).loss.detach()

    def child(connection) -> None:
        try:
            model(imgs)
        except RuntimeError as error:
            connection.send(str(error))

    receiving, sending = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=child, args=(sending,))
    process.start()
    assert receiving.poll(60)
    assert "spawn" in receiving.recv()
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(model(imgs, noise=noise_for(model).to(DEVICE)).loss.detach(), before)


def test_a_step_without_memory_leaves_what_was_before_it():
    """Wherever in the step memory ends; with enough of it the model takes its step."""
    model = fused_mae()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = adamw(model, 0.01, backend="torch")
    imgs = images_for(model, N=512).to(DEVICE)
    total = torch.cuda.get_device_properties(0).total_memory
    failures = 0
    for allowance in (int(2**20 * 1.4**i) for i in range(25)):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + allowance) / total)
        try:
            training_step(model, optimizer, imgs, autocast=BF16, return_pred=False)
            break
        except torch.OutOfMemoryError:
            failures += 1
            assert_equal([p.detach() for p in model.parameters()], before)
            assert all(p.grad is None for p in model.parameters())
            assert len(optimizer.state) == 0
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert failures > 3
    assert not torch.equal(next(p for p in model.parameters() if p.requires_grad), before[0])
