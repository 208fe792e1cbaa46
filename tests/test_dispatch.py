"""Which backend runs: auto, requests that never fall back, the environment variable, explain()."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from support import NATIVE, Calls, images_for, multiplies, noise_for, pretend_hopper, set_fact, small_mae
from torch import Tensor

import maefast
from maefast import dispatch, kernels, ops
from maefast import gpu as gpu_facts
from maefast.ops.gather_patches import PatchesAsk
from maefast.ops.masked_mse import MseAsk
from maefast.ops.random_masking import MaskingAsk
from maefast.ops.unshuffle import UnshuffleAsk

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, BF16, F16, F64, U8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8
AUTO = "native" if NATIVE else "eager"
NAMES = "auto, native, triton, apex, flash_attn, sdpa, eager"


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False)


def ops_of_a_step(model: torch.nn.Module, imgs: torch.Tensor, noise: torch.Tensor) -> set[str]:
    with Calls() as calls:
        model(imgs, noise=noise).loss.backward()
    return set(calls.names)


def test_auto_takes_native_where_it_can(native):
    model = small_mae()
    with_gradient = ("unshuffle", "masked_mse", "layer_norm", "bias_gelu", "attention")
    names = {f"{op}_{direction}" for op in with_gradient for direction in ("fwd", "bwd")}
    names |= {"random_masking_fwd", "gather_patches_fwd", "add_layer_norm_fwd"}
    for dtype, expected in ((F32, names), (BF16, names), (F16, names), (F64, {"random_masking_fwd"})):
        called = ops_of_a_step(model.to(dtype), images_for(model).to(dtype), noise_for(model))
        assert called - ({"linear_fwd"} if dtype in (F32, BF16) else set()) == expected


def test_eager_runs_no_native_op():
    model = small_mae()
    with maefast.backend("eager"):
        assert ops_of_a_step(model, images_for(model), noise_for(model)) == set()


MASKING, MSE = dispatch.OPS["random_masking"], dispatch.OPS["masked_mse"]
NOISE = MaskingAsk(CPU, torch.float32, patches=5)


def test_requests_nest_and_end():
    with maefast.backend("eager"):
        with maefast.backend("auto"):
            assert dispatch.choose(MSE, MSE.example(CPU, torch.float64)) == "eager"
        with pytest.raises(ZeroDivisionError), maefast.backend("auto"):
            1 / 0  # noqa: B018
        assert dispatch.choose(MASKING, NOISE) == "eager"
    assert dispatch.choose(MASKING, NOISE) == AUTO


@pytest.mark.parametrize("name", ["nativ", "", "cuda", "EAGER"])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=f"backend must be one of {NAMES}.*'{name}'"), maefast.backend(name):
        pass
    assert dispatch.choose(MASKING, NOISE) == AUTO


def test_a_request_that_cannot_run_raises_with_the_reason(native):
    model = small_mae().double()
    imgs, ids = torch.rand(1, 1, 4, 4).double(), torch.tensor([[1]])
    token, pos, pred = torch.rand(1, 1, 3), torch.rand(1, 2, 3), torch.rand(1, 4, 4).double()
    for call, message in (
        (lambda: ops.gather_patches(imgs, ids, 2), r"gather_patches cannot run on the requested backend.*imgs is float64"),
        (lambda: ops.unshuffle(pos.double(), ids * 0, token, pos), r"unshuffle cannot run.*'native'.*x is float64"),
        (lambda: model(images_for(model).double()), r"cannot run.*'native'.*float64"),
        (lambda: ops.masked_mse(pred, imgs.float(), torch.ones(1, 4), 2, False), r"masked_mse cannot run.*pred is float64"),
        (lambda: ops.random_masking(torch.rand(1, 4, device="meta"), 2), r"random_masking cannot run.*noise is on meta"),
    ):
        with maefast.backend("native"), pytest.raises(RuntimeError, match=message) as caught:
            call()
        assert "'native'" in str(caught.value)
    assert ops.gather_patches(imgs, ids, 2).dtype == torch.float64


@pytest.mark.parametrize("op", dispatch.OPS.values(), ids=dispatch.OPS)
def test_every_backend_answers_in_one_sentence(op):
    ask = op.example(torch.device("meta"), torch.float32)
    assert dispatch.why_not(op, "eager", ask) is None
    for name, installed in (("native", NATIVE), ("triton", kernels.HAS_TRITON)):
        reason = dispatch.why_not(op, name, ask)
        assert reason.count("\n") == 0
        assert "meta" in reason or not installed or reason == f"there is no {name} kernel of {op.name}"


def test_a_request_for_triton_on_the_cpu_raises_with_the_reason():
    reason = "triton random_masking runs on a GPU, noise is on cpu" if kernels.HAS_TRITON else "Triton is not installed"
    with pytest.raises(RuntimeError, match=reason), maefast.backend("triton"):
        ops.random_masking(torch.rand(1, 4), 2)


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
def test_a_request_binds_the_ops_that_have_a_kernel(capsys):
    """The others choose by themselves, and the table says so."""
    attention = dispatch.OPS["attention"]
    with maefast.backend("triton"):
        assert dispatch.choose(attention, attention.example(CPU, torch.float32)) == AUTO
        table = explained(capsys)
        assert ops.attention(torch.rand(1, 2, 6), 1).shape == (1, 2, 2)
    without = {name for name, op in dispatch.OPS.items() if all(kernel.backend != "triton" for kernel in op.kernels)}
    assert without == set(dispatch.OPS) - kernels.OPS - {"transformer_block"}
    for op in dispatch.OPS:
        backend, why = table[op]
        if op in without:
            assert backend != "triton"
            assert f"triton was requested and does not bind this op: there is no triton kernel of {op}" in why
        else:
            assert backend == "triton"
            assert why.startswith(f"triton was requested and cannot run: triton {op} runs on a GPU")


@pytest.mark.parametrize(("value", "expected"), [("auto", AUTO), ("eager", "eager"), *[("native", "native")] * NATIVE])
def test_environment_variable(value, expected):
    code = """import torch, maefast; op = maefast.dispatch.OPS["random_masking"]
print(maefast.dispatch.choose(op, op.example(torch.device("cpu"), torch.float32))); maefast.explain()"""
    done = run_python(code, MAEFAST_BACKEND=value)
    assert done.returncode == 0, done.stderr
    facts, table = done.stdout.split("why not the others\n")
    assert facts.splitlines()[0] == expected
    backends = dict.fromkeys(dispatch.OPS, expected) | {"mask_patches": "eager"}  # whose kernel is a GPU's
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
    assert table.keys() == dispatch.OPS.keys()
    for op, first in {"random_masking": "noise", "gather_patches": "imgs", "unshuffle": "x", "masked_mse": "pred"}.items():
        triton = f"triton {op} runs on a GPU, {first} is on cpu" if kernels.HAS_TRITON else "Triton is not installed"
        assert table[op] == ("native", f"triton: {triton}; eager: native is faster")
    table = explained(capsys, dtype=torch.float64)
    assert table["masked_mse"][0] == "eager"
    assert "native: native masked_mse takes float32, bfloat16, float16, pred is float64" in table["masked_mse"][1]
    with maefast.backend("eager"):
        backend, why = explained(capsys)["unshuffle"]
        assert (backend, why.split("; ")[0]) == ("eager", "native: eager was requested")
    table = explained(capsys, device="meta")
    assert table["gather_patches"][0] == "eager"
    assert "native gather_patches runs on the CPU and on a GPU, imgs is on meta" in table["gather_patches"][1]


def test_explain_reports_a_request_that_cannot_run(native, capsys):
    """It prints the table all the same: it is where one looks when a request fails."""
    with maefast.backend("native"):
        table = explained(capsys, dtype=torch.float64)
    assert "float64" in " ".join(table["masked_mse"])


@pytest.fixture
def gpu(monkeypatch) -> None:
    pretend_hopper(monkeypatch)
    set_fact(monkeypatch, kernels, "HAS_TRITON", True)


GPU_ASKS = {
    "random_masking": MaskingAsk(CUDA, F32, patches=196),
    "gather_patches": PatchesAsk(CUDA, U8, BF16, differentiated=False),
    "unshuffle": UnshuffleAsk(CUDA, BF16, F32, F32),
    "masked_mse": MseAsk(CUDA, F32, F32, differentiated=False, channels=3, values=768),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", GPU_ASKS)
def test_native_kernels_of_the_mae_ops_on_a_gpu(name, monkeypatch):
    """`auto` prefers Triton's kernels, which have been measured, to these, and these to eager."""
    op, ask = dispatch.OPS[name], GPU_ASKS[name]
    assert dispatch.why_not(op, "native", ask) is None
    assert dispatch.choose(op, ask) == "triton"
    with maefast.backend("native"):
        assert dispatch.choose(op, ask) == "native"
    set_fact(monkeypatch, kernels, "HAS_TRITON", False)
    assert dispatch.choose(op, ask) == "native"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("name", "field", "size"),
    [("random_masking", "patches", size) for size in (1025, 2048)]
    + [("masked_mse", "values", size) for size in (4097, 4098, 12272)],
)
def test_sizes_that_triton_does_not_take_are_native(name, field, size):
    op, ask = dispatch.OPS[name], GPU_ASKS[name]._replace(**{field: size})
    assert "up to" in dispatch.why_not(op, "triton", ask)
    assert dispatch.choose(op, ask) == "native"
    assert dispatch.choose(op, ask._replace(**{field: 8 * size})) == "eager"


@pytest.mark.usefixtures("gpu")
def test_what_native_kernels_of_the_mae_ops_do_not_take_on_a_gpu(monkeypatch):
    def why(name: str, **changed: object) -> str:
        op, ask = dispatch.OPS[name], GPU_ASKS[name]._replace(**changed)
        reason = dispatch.why_not(op, "native", ask)
        with maefast.backend("native"), pytest.raises(RuntimeError, match=re.escape(str(reason))):
            dispatch.choose(op, ask)
        return reason

    assert "ranks up to 2048 patches, noise has 2049" in why("random_masking", patches=2049)
    assert "takes float32, bfloat16, float16, uint8, imgs is float64" in why("gather_patches", imgs=F64)
    assert "they are float16, float32 beside bfloat16" in why("unshuffle", mask_token=F16)
    assert "holds patches of up to 12272 values, pred has 12288" in why("masked_mse", values=12288)
    assert "no gradient for imgs" in why("masked_mse", differentiated=True)
    norm = dispatch.OPS["layer_norm"]
    ask = norm.example(CUDA, F32)
    assert dispatch.why_not(norm, "native", ask) == "native layer_norm runs on the CPU, x is on cuda"
    with maefast.backend("native"):
        assert dispatch.choose(norm, ask) == "triton", "a request binds what is native on the device"
    set_fact(monkeypatch, gpu_facts, "capability", lambda device: (7, 5))
    assert "needs compute capability 8.0, noise is on a GPU of 7.5" in why("random_masking")


@pytest.mark.usefixtures("gpu")
def test_masking_and_reading_patches_are_one_launch_where_both_are_native(monkeypatch):
    op = dispatch.OPS["mask_patches"]
    ask = op.example(CUDA, F32)
    assert dispatch.choose(op, ask) == "eager"
    assert "faster than two of triton's" in dispatch.why_passed_over(op, "native", ask)
    with maefast.backend("native"):
        assert dispatch.choose(op, ask) == "native"
        with pytest.raises(RuntimeError, match="native mask_patches on a GPU ranks up to 2048 patches, noise has 2049"):
            dispatch.choose(op, ask._replace(patches=2049))
    set_fact(monkeypatch, kernels, "HAS_TRITON", False)
    assert dispatch.choose(op, ask) == "native"


class NullAsk(NamedTuple):
    device: torch.device
    x: torch.dtype


@pytest.fixture
def null() -> Iterator[dispatch.Op]:
    """An op that gives its input back, with a kernel on the CPU: all that a new op needs."""
    yield dispatch.Op("null", (dispatch.Kernel("native", ("cpu",), (F32,)),), {"cpu": ("native",)}, NullAsk)
    del dispatch.OPS["null"]


def test_a_new_op_needs_no_other_file(native, null, capsys):
    def run(x: Tensor) -> str:
        return dispatch.choose(null, NullAsk(x.device, x.dtype))

    assert run(torch.ones(2)) == "native"
    assert run(torch.ones(2).double()) == "eager"
    with maefast.backend("eager"):
        assert run(torch.ones(2)) == "eager"
    with maefast.backend("native"), pytest.raises(RuntimeError, match=r"null cannot run .*'native': native null takes float32"):
        run(torch.ones(2).double())
    with maefast.backend("sdpa"):
        assert run(torch.ones(2)) == "native", "sdpa has no kernel of it"
    assert explained(capsys)["null"] == ("native", "eager: native is faster")
    with pytest.raises(ValueError, match="backend must be one of auto, native, eager; it is 'sdpa'"):
        dispatch.check_backend(null, "sdpa", "backend")


def test_a_decision_is_made_once(null, monkeypatch):
    made = []
    monkeypatch.setattr(dispatch, "why_not", lambda *arguments: made.append(arguments))
    ask = NullAsk(CPU, F32)
    for _ in range(3):
        assert dispatch.choose(null, ask) == "native"
    assert len(made) == 1
    with maefast.backend("native"):
        dispatch.choose(null, ask)
    assert len(made) == 2, "a request is another decision"
    dispatch.choose(null, ask)
    assert len(made) == 2
