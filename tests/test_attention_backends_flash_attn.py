"""Attention on a stand-in for flash-attn: results, layouts, compiled code, refusals."""

import os
import re
import subprocess
import sys

import pytest
import torch
from flash_attn_standin import write_flash_attn
from support import forward_backward, images_for, noise_for, padded, set_fact, small_mae, small_reference, transposed
from torch import Tensor

import maefast
from maefast import _flash_attn, dispatch, ops
from maefast import gpu as gpu_facts
from maefast.ops.attention import OP as ATTENTION
from maefast.ops.attention import AttentionAsk
from maefast.testing.errors import assert_close_to_float64

BF16 = torch.bfloat16


@pytest.mark.skipif(_flash_attn.RELEASE is not None, reason="flash-attn is installed")
def test_flash_attn_is_not_installed():
    message = "backend asks for flash_attn: flash-attn is not installed"
    with pytest.raises(RuntimeError, match=f"attn_{message}"):
        small_mae(attn_backend="flash_attn")
    with pytest.raises(RuntimeError, match=f"^{message}"), maefast.backend("flash_attn"):
        pass


@pytest.fixture(params=[2, 4])
def flash_attn(request, tmp_path, monkeypatch) -> int:
    """Install a stand-in for a release of flash-attn on the CPU, and pretend a Hopper GPU."""
    write_flash_attn(tmp_path, request.param)
    monkeypatch.syspath_prepend(tmp_path)
    assert _flash_attn._installed() == request.param
    monkeypatch.setattr(_flash_attn, "RELEASE", request.param)
    # As where the package is installed for good.
    monkeypatch.setattr(_flash_attn, "_why_not_loaded", torch.compiler.assume_constant_result(_flash_attn._why_not_loaded))
    monkeypatch.setattr(_flash_attn, "_DEVICE", "cpu")
    set_fact(monkeypatch, gpu_facts, "capability", lambda device: (9, 0))
    yield request.param
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


def qkv_and_q(N: int, T: int, h: int, d: int, M: int | None) -> dict[str, Tensor]:
    qkv = torch.randn(N, T, (3 if M is None else 2) * h * d).to(BF16).requires_grad_()
    return {"qkv": qkv} | ({} if M is None else {"q": torch.randn(N, M, h * d).to(BF16).requires_grad_()})


@pytest.mark.parametrize("M", [None, 5])
@pytest.mark.parametrize(("N", "T", "h", "d"), [(2, 7, 3, 16), (1, 1, 1, 8), (2, 50, 2, 64)])
def test_flash_attn(flash_attn, N, T, h, d, M):
    inputs, dy = qkv_and_q(N, T, h, d, M), torch.randn(N, M or T, h * d)

    def run(backend: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return forward_backward(lambda **given: ops.attention(num_heads=h, backend=backend, **given), inputs, dy)

    got, eager = run("flash_attn", inputs), run("eager", inputs)
    exact = run("eager", {name: t.detach().double().requires_grad_() for name, t in inputs.items()})
    for name, value in got.items():
        assert value.dtype == BF16
        assert_close_to_float64(name, value, eager[name], exact[name])


def test_flash_attn_gets_rows_that_its_kernels_can_read(flash_attn):
    """Whatever the layout: the stand-in refuses what the kernels would fault on."""
    qkv, dout = torch.randn(2, 5, 48).to(BF16), torch.randn(2, 5, 16).to(BF16)
    for layout in (padded, transposed, lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)):
        leaf = layout(qkv).requires_grad_()
        out = ops.attention(leaf, 2, backend="flash_attn")
        torch.autograd.grad(out, leaf, transposed(dout))
        assert torch.equal(out, ops.attention(qkv, 2, backend="flash_attn"))


def test_flash_attn_with_nothing_to_do(flash_attn):
    for shape in ((0, 5, 48), (2, 0, 48)):
        out = ops.attention(torch.empty(shape, dtype=BF16, requires_grad=True), 2, backend="flash_attn")
        out.sum().backward()
        assert out.shape == (*shape[:2], 16)


def test_flash_attn_in_compiled_code(flash_attn, fresh_dynamo):
    qkv, dout = torch.randn(2, 5, 48).to(BF16).requires_grad_(), torch.randn(2, 5, 16).to(BF16)
    compiled = torch.compile(lambda qkv: ops.attention(qkv, 2, backend="flash_attn"), fullgraph=True, backend="aot_eager")
    out, expected = compiled(qkv), ops.attention(qkv, 2, backend="flash_attn")
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out, qkv, dout), torch.autograd.grad(expected, qkv, dout), strict=True):
        torch.testing.assert_close(a, b)


def test_flash_attn_ops(flash_attn):
    if flash_attn != 4:
        pytest.skip("release 2 has ops of its own")
    q, k, v = (torch.randn(2, T, 3, 16).to(BF16).requires_grad_() for T in (4, 5, 5))
    torch.library.opcheck(torch.ops.maefast_flash_attn.fwd.default, (q, k, v))


@pytest.mark.parametrize("options", [{}, {"return_pred": False}])
def test_a_step_on_flash_attn(native, flash_attn, options):
    sizes = {"embed_dim": 32, "num_heads": 2, "decoder_embed_dim": 24, "decoder_num_heads": 3}
    model, reference = small_mae(attn_backend="flash_attn", **sizes), small_reference(**sizes)
    imgs, noise = images_for(model), noise_for(model)
    with torch.autocast("cpu", BF16):
        loss = model(imgs, noise=noise, **options).loss
        expected = reference(imgs, noise=noise).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_what_flash_attn_does_not_take(flash_attn, monkeypatch):
    def why(qkv: Tensor, width: int, capability: tuple[int, int] = (9, 0)) -> str:
        set_fact(monkeypatch, gpu_facts, "capability", lambda device: capability)
        ask = AttentionAsk(qkv.device, qkv.dtype, qkv.shape[1], width, queries=False)
        reason = dispatch.why_not(ATTENTION, "flash_attn", ask)
        if reason is not None:
            with pytest.raises(RuntimeError, match=re.escape(reason)):
                dispatch.choose(ATTENTION, ask, "flash_attn")
        return str(reason)

    half = torch.empty(1, 4, 3 * 64, dtype=BF16)
    assert why(half, 64) == "None"
    assert why(half.float(), 64) == "flash-attn takes bfloat16, float16, qkv is float32"
    assert "multiple of 8; they are 12 wide" in why(half, 12)
    assert "up to 256, a multiple of 8; they are 264 wide" in why(half, 264)
    if flash_attn == 2:
        assert "needs compute capability 8.0, the GPU has 7.5" in why(half, 64, (7, 5))
        assert why(half, 192, (10, 0)) == "None"
    else:
        assert "needs compute capability 9, 10 or 11, the GPU has 8.9" in why(half, 64, (8, 9))
        assert "the GPU has 12.0" in why(half, 64, (12, 0))
        assert "heads of up to 128 on this GPU, they are 192 wide" in why(half, 192, (10, 0))
        assert why(half, 256, (10, 0)) == "None"
    monkeypatch.setattr(_flash_attn, "_DEVICE", "cuda")
    assert why(half, 64) == "flash-attn runs on a GPU, qkv is on cpu"


def test_flash_attn_that_does_not_load(flash_attn, tmp_path):
    file = tmp_path / "flash_attn" / ("__init__.py" if flash_attn == 2 else "cute/interface.py")
    file.write_text("import no_such_module_of_cuda\n")
    with pytest.raises(RuntimeError, match=r"flash-attn does not load beside torch .*no_such_module_of_cuda"):
        ops.attention(torch.empty(1, 4, 48, dtype=BF16), 2, backend="flash_attn")


def test_flash_attn_by_the_environment(native, tmp_path):
    """A fresh process finds it, imports it only to run it, and binds it to attention alone."""
    write_flash_attn(tmp_path, 2)
    code = """import sys, torch, maefast
maefast.explain()
print(sorted(name for name in sys.modules if name.startswith("flash_attn")))
maefast.ops.attention(torch.rand(1, 2, 6), 1)"""
    env = os.environ | {"MAEFAST_BACKEND": "flash_attn", "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False)
    *table, modules = done.stdout.splitlines()
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in table[1:]}
    reason = "flash-attn runs on a GPU, qkv is on cpu"
    assert rows["attention"][0] == "flash_attn"
    assert rows["attention"][1].startswith(f"flash_attn was requested and cannot run: {reason}")
    backend, why = rows["unshuffle"]
    assert backend == "native"
    assert "flash_attn was requested and does not bind this op: there is no flash_attn kernel of unshuffle" in why
    assert modules == "[]"
    assert f"attention cannot run on the requested backend 'flash_attn': {reason}" in done.stderr
