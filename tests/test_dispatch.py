"""Which backend runs: auto, requests that never fall back, the environment variable, explain()."""

import os
import re
import subprocess
import sys

import pytest
import torch
from support import NATIVE, images_for, multiplies, noise_for, small_mae
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import maefast
from maefast import _library, dispatch, kernels, ops

AUTO = "native" if NATIVE else "eager"
NAMES = "auto, native, triton, apex, flash_attn, sdpa, eager"


class Seen(TorchDispatchMode):
    """The native ops that ran within the block."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "maefast":
            self.names.add(func._schema.name.removeprefix("maefast::"))
        return func(*args, **(kwargs or {}))


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ops_of_a_step(model: torch.nn.Module, imgs: torch.Tensor, noise: torch.Tensor) -> set[str]:
    with Seen() as seen:
        model(imgs, noise=noise).loss.backward()
    return seen.names


def test_auto_takes_native_where_it_can(native):
    model = small_mae()
    with_gradient = ("unshuffle", "masked_mse", "layer_norm", "bias_gelu", "attention")
    names = {f"{op}_{direction}" for op in with_gradient for direction in ("fwd", "bwd")}
    names |= {"random_masking_fwd", "gather_patches_fwd", "add_layer_norm_fwd"}
    assert ops_of_a_step(model, images_for(model), noise_for(model)) - {"linear_fwd"} == names
    assert ops_of_a_step(model.bfloat16(), images_for(model).bfloat16(), noise_for(model)) - {"linear_fwd"} == names
    assert ops_of_a_step(model.half(), images_for(model).half(), noise_for(model)) == names
    assert ops_of_a_step(model.double(), images_for(model).double(), noise_for(model)) == {"random_masking_fwd"}


def test_eager_runs_no_native_op():
    model = small_mae()
    with maefast.backend("eager"):
        assert ops_of_a_step(model, images_for(model), noise_for(model)) == set()


def test_requests_nest_and_end():
    x = torch.rand(2, 5).double()
    with maefast.backend("eager"):
        with maefast.backend("auto"):
            assert dispatch.choose("masked_mse", {"pred": x}) == "eager"
        with pytest.raises(ZeroDivisionError), maefast.backend("auto"):
            1 / 0  # noqa: B018
        assert dispatch.choose("random_masking", {"noise": x.float()}) == "eager"
    assert dispatch.choose("random_masking", {"noise": x.float()}) == AUTO


@pytest.mark.parametrize("name", ["nativ", "", "cuda", "EAGER"])
def test_unknown_backend(name):
    with (
        pytest.raises(ValueError, match=f"backend must be one of {NAMES}.*'{name}'"),
        maefast.backend(name),
    ):
        pass
    assert dispatch.choose("random_masking", {"noise": torch.rand(1, 2)}) == AUTO


def test_a_request_that_cannot_run_raises_with_the_reason(native):
    model = small_mae().double()
    imgs, ids = torch.rand(1, 1, 4, 4).double(), torch.tensor([[1]])
    with maefast.backend("native"):
        with pytest.raises(RuntimeError, match=r"gather_patches cannot run on the requested backend 'native'.*imgs is float64"):
            ops.gather_patches(imgs, ids, 2)
        with pytest.raises(RuntimeError, match=r"unshuffle cannot run.*'native'.*x is float64"):
            ops.unshuffle(torch.rand(1, 2, 3).double(), ids * 0, torch.rand(1, 1, 3), torch.rand(1, 2, 3))
        with pytest.raises(RuntimeError, match=r"cannot run.*'native'.*float64"):
            model(images_for(model).double())
        with pytest.raises(RuntimeError, match=r"masked_mse cannot run.*'native'.*pred is float64"):
            ops.masked_mse(torch.rand(1, 4, 4).double(), imgs.float(), torch.ones(1, 4), 2, False)
        with pytest.raises(RuntimeError, match=r"random_masking cannot run.*'native'.*noise is on meta"):
            ops.random_masking(torch.rand(1, 4, device="meta"), 2)
    assert ops.gather_patches(imgs, ids, 2).dtype == torch.float64


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_backend_answers_in_one_sentence(op):
    assert dispatch.can_run(op, "eager", {}) is None
    for name, installed in (("native", NATIVE), ("triton", kernels.HAS_TRITON)):
        reason = dispatch.can_run(op, name, {"pred": torch.empty(0, device="meta")})
        assert reason.count("\n") == 0
        assert "meta" in reason or not installed or reason == f"there is no Triton kernel of {op}"


def test_a_request_for_triton_on_the_cpu_raises_with_the_reason():
    reason = "the Triton kernels run on a GPU, noise is on cpu" if kernels.HAS_TRITON else "Triton is not installed"
    with pytest.raises(RuntimeError, match=reason), maefast.backend("triton"):
        ops.random_masking(torch.rand(1, 4), 2)


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
def test_a_request_binds_the_ops_that_have_a_kernel(capsys):
    """The others choose by themselves, and the table says so."""
    inputs = {"qkv": torch.rand(1, 2, 6)}
    with maefast.backend("triton"):
        assert dispatch.choose("attention", inputs) == AUTO
        table = explained(capsys)
        assert ops.attention(inputs["qkv"], 1).shape == (1, 2, 2)
    without = set(dispatch.OPS) - kernels.OPS
    assert without
    for op in dispatch.OPS:
        backend, why = table[op]
        if op in without:
            assert backend != "triton"
            assert f"triton was requested and does not bind this op: there is no Triton kernel of {op}" in why
        else:
            assert backend == "triton"
            assert why.startswith("triton was requested and cannot run: the Triton kernels run on a GPU")


@pytest.mark.parametrize(("value", "expected"), [("auto", AUTO), ("eager", "eager"), *[("native", "native")] * NATIVE])
def test_environment_variable(value, expected):
    code = (
        "import torch, maefast; print(maefast.dispatch.choose('random_masking', {'noise': torch.rand(1, 2)})); maefast.explain()"
    )
    done = run_python(code, MAEFAST_BACKEND=value)
    assert done.returncode == 0, done.stderr
    facts, table = done.stdout.split("why not the others\n")
    assert facts.splitlines()[0] == expected
    backends = dict.fromkeys(dispatch.OPS, expected)
    if value == "auto" and not multiplies(torch.float32):
        backends["linear"] = "eager"
    assert dict(line.split()[:2] for line in table.splitlines()) == backends
    assert (done.stderr == "") == NATIVE


def test_environment_variable_of_an_unknown_backend():
    done = run_python("import maefast", MAEFAST_BACKEND="triton9")
    assert done.returncode != 0
    assert f"ValueError: MAEFAST_BACKEND must be one of {NAMES}; it is 'triton9'" in done.stderr


def explained(capsys: pytest.CaptureFixture[str], **options: object) -> dict[str, tuple[str, str]]:
    maefast.explain(**options)
    facts, table = capsys.readouterr().out.split("why not the others\n")
    assert facts.splitlines()[-1].split() == ["op", "backend"]
    return {op: (backend, why) for op, backend, why in (line.split(maxsplit=2) for line in table.splitlines())}


def test_explain(native, capsys):
    table = explained(capsys)
    assert tuple(table) == dispatch.OPS
    for op, first in {"random_masking": "noise", "gather_patches": "imgs", "unshuffle": "x", "masked_mse": "pred"}.items():
        triton = f"the Triton kernels run on a GPU, {first} is on cpu" if kernels.HAS_TRITON else "Triton is not installed"
        assert table[op] == ("native", f"triton: {triton}; eager: native is faster")
    table = explained(capsys, dtype=torch.float64)
    assert table["masked_mse"][0] == "eager"
    assert "native: native masked_mse takes float32, bfloat16, float16, pred is float64" in table["masked_mse"][1]
    with maefast.backend("eager"):
        backend, why = explained(capsys)["unshuffle"]
        assert (backend, why.split("; ")[0]) == ("eager", "native: eager was requested")
    table = explained(capsys, device="meta")
    assert table["gather_patches"][0] == "eager"
    assert "run on the CPU" in table["gather_patches"][1]


def test_explain_reports_a_request_that_cannot_run(native, capsys):
    """It prints the table all the same: it is where one looks when a request fails."""
    with maefast.backend("native"):
        table = explained(capsys, dtype=torch.float64)
    assert "float64" in " ".join(table["masked_mse"])


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A build with CUDA kernels and a Hopper GPU, to all that dispatch can tell."""
    monkeypatch.setattr(_library, "HAS_NATIVE", True)
    monkeypatch.setattr(_library, "HAS_CUDA", True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


GPU_INPUTS = {
    "random_masking": {"noise": fake(2, 196)},
    "gather_patches": {"imgs": fake(2, 3, 224, 224, dtype=torch.uint8), "out": fake(0, dtype=torch.bfloat16)},
    "unshuffle": {"x": fake(2, 50, 512, dtype=torch.bfloat16), "mask_token": fake(1, 1, 512), "pos_embed": fake(1, 197, 512)},
    "masked_mse": {"pred": fake(2, 147, 768), "imgs": fake(2, 3, 224, 224), "mask": fake(2, 196)},
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("op", GPU_INPUTS)
def test_native_kernels_of_the_mae_ops_on_a_gpu(op, monkeypatch):
    """`auto` prefers Triton's, which have been measured; where there is no Triton they beat eager's many passes."""
    inputs = GPU_INPUTS[op]
    assert dispatch.can_run(op, "native", inputs) is None
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    assert dispatch.choose(op, inputs) == "triton"
    with maefast.backend("native"):
        assert dispatch.choose(op, inputs) == "native"
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert dispatch.choose(op, inputs) == "native"


@pytest.mark.usefixtures("gpu")
def test_what_native_kernels_of_the_mae_ops_do_not_take_on_a_gpu(monkeypatch):
    def why(op: str, **changed: Tensor) -> str:
        reason = dispatch.can_run(op, "native", GPU_INPUTS[op] | changed)
        with maefast.backend("native"), pytest.raises(RuntimeError, match=re.escape(str(reason))):
            dispatch.choose(op, GPU_INPUTS[op] | changed)
        return reason

    assert "ranks up to 2048 patches, noise has 2049" in why("random_masking", noise=fake(2, 2049))
    assert "takes float32, bfloat16, float16, uint8, imgs is float64" in why("gather_patches", imgs=fake(0, dtype=torch.float64))
    assert "they are float16, float32 beside bfloat16" in why("unshuffle", mask_token=fake(1, 1, 512, dtype=torch.float16))
    assert "holds patches of up to 12272 values, pred has 12288" in why("masked_mse", pred=fake(1, 2, 12288))
    assert "no gradient for imgs" in why("masked_mse", imgs=fake(2, 3, 224, 224).requires_grad_())
    norm = dict.fromkeys(("x", "weight", "bias", "out"), fake(2, 8))
    assert "there is no native kernel of layer_norm for GPUs" in dispatch.can_run("layer_norm", "native", norm)
    with maefast.backend("native"):
        assert dispatch.choose("layer_norm", norm) == "eager", "a request binds what is native on the device"
    monkeypatch.setattr(dispatch, "_capability", lambda device: (7, 5))
    assert "needs compute capability 8.0, noise is on a GPU of 7.5" in why("random_masking")
