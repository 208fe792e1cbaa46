"""Native attention on a GPU: the error rule, the same bits twice, compiled code, CUDA graphs."""

import pytest
import torch
from support import assert_equal, forward_backward
from torch import Tensor

import maefast
from maefast import _library, dispatch, gpu, ops, tuned
from maefast.ops.attention import OP as ATTENTION
from maefast.ops.attention import AttentionAsk
from maefast.testing.errors import assert_close_to_float64

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not _library.HAS_CUDA, reason="needs a GPU and a build with CUDA kernels"
)

BF16, F16 = torch.bfloat16, torch.float16
SMALL = [(1, 1, 32), (2, 9, 32), (3, 49, 64), (2, 50, 64), (2, 65, 80)]  # h, T, d
LARGE = [(4, T, 32) for T in (80, 81, 197, 208, 209, 257, 288)] + [(3, T, 64) for T in (64, 80, 197)] + [(2, 80, 80)]
LONGEST = {32: 288, 64: 208, 80: 80}
RAGGED = [(3, T, d) for d in LONGEST for T in (2, 7, 63, 66, 196, 198, 256) if LONGEST[d] >= T]  # one off a tile or a model
CASES = [(N, *size, 1.0) for N, sizes in ((3, SMALL), (17, LARGE), (2, RAGGED)) for size in sizes]
CASES += [(2, 2, T, d, 0.0) for T, d in ((50, 64), (65, 80), (197, 32))]  # equal scores


def run(qkv: Tensor, dout: Tensor, h: int, backend: str) -> dict[str, Tensor]:
    with maefast.backend(backend):
        return forward_backward(lambda qkv: ops.attention(qkv, h), {"qkv": qkv.detach().requires_grad_()}, dout)


def inputs(N: int, h: int, T: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return scale * torch.randn(N, T, 3 * h * d, device="cuda").to(dtype), torch.randn(N, T, h * d, device="cuda")


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("N", "h", "T", "d", "q_scale"), CASES)
def test_sizes(N, h, T, d, q_scale, dtype):
    qkv, dout = inputs(N, h, T, d, dtype)
    qkv[..., : h * d] *= q_scale
    got, again = (run(qkv, dout, h, "native") for _ in range(2))
    eager, exact = run(qkv, dout, h, "eager"), run(qkv.double(), dout, h, "eager")
    for name, value in got.items():
        assert torch.equal(value, again[name]), f"{name}: two runs differ"
        assert value.dtype == dtype
        assert_close_to_float64(f"T = {T}, d = {d}, {name}", value, eager[name], exact[name])


@pytest.mark.parametrize(("h", "T", "d"), [(2, 50, 64), (2, 65, 80), (2, 197, 32), (2, 257, 32)])
def test_small_tiles(h, T, d):
    """Each tile that takes these rows, where the GPU has its shared memory."""
    qkv, dout = inputs(5, h, T, d, BF16)
    eager, exact = run(qkv, dout, h, "eager"), run(qkv.double(), dout, h, "eager")
    available = gpu.shared_memory(qkv.device)
    for direction in ("fwd", "bwd"):
        lines = tuned.fitting_tiles(direction, d, T)
        for tile in (i for i, line in enumerate(lines) if line["shared"] <= available):
            with tuned.trying(tuned.attention_kernel(direction, d, T), d, qkv.device, {"tile": tile}):
                got = run(qkv, dout, h, "native")
            for name, value in got.items():
                assert_close_to_float64(f"{direction}, tile {tile}, {name}", value, eager[name], exact[name])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("h", "T", "d"), [(2, 50, 64), (2, 65, 80), (2, 197, 32)])
def test_extreme_logits(h, T, d, dtype):
    qkv, dout = inputs(2, h, T, d, dtype, scale=100.0)
    for name, value in run(qkv, dout, h, "native").items():
        assert value.isfinite().all(), name


def test_small_layouts():
    """Strided and misaligned views give what a copy gives."""
    qkv, dout = inputs(3, 2, 50, 64, BF16)
    expected = run(qkv, dout, 2, "native")
    wide = torch.zeros(3, 50, 3 * 128 + 3, device="cuda", dtype=BF16)
    wide[..., 3:] = qkv
    for view in (wide[..., 3:], qkv.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_equal(run(view, dout, 2, "native"), expected)


def test_small_nothing_to_do():
    for shape in ((0, 50, 384), (2, 0, 384)):
        qkv = torch.empty(shape, device="cuda", dtype=BF16, requires_grad=True)
        with maefast.backend("native"):
            out = ops.attention(qkv, 2)
        out.sum().backward()
        assert out.shape == (*shape[:2], 128)
        assert qkv.grad.shape == shape


def test_opcheck():
    qkv, dout = inputs(2, 2, 50, 64, BF16)
    torch.library.opcheck(torch.ops.maefast.attention_fwd.default, (None, qkv, 2))
    out, lse = torch.ops.maefast.attention_fwd(None, qkv, 2)
    torch.library.opcheck(torch.ops.maefast.attention_bwd.default, (dout.to(BF16), None, qkv, out, lse, 2))


def test_compiled():
    qkv, dout = inputs(4, 3, 50, 64, BF16)
    expected = run(qkv, dout, 3, "native")
    leaf = qkv.detach().requires_grad_()
    with maefast.backend("native"):
        out = torch.compile(ops.attention, fullgraph=True)(leaf, 3)
    (dqkv,) = torch.autograd.grad(out, leaf, dout.to(BF16))
    assert_equal({"out": out, "d_qkv": dqkv}, expected)


def test_graph():
    qkv, _ = inputs(4, 3, 197, 32, BF16)
    with maefast.backend("native"), torch.no_grad():
        ops.attention(qkv, 3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.attention(qkv, 3)
        qkv.copy_(torch.randn_like(qkv))
        graph.replay()
        assert torch.equal(out, ops.attention(qkv, 3))


def test_a_second_stream():
    qkv, _ = inputs(64, 16, 197, 32, BF16)
    with maefast.backend("native"), torch.no_grad():
        expected = ops.attention(qkv, 16)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                out = ops.attention(qkv, 16)
        stream.synchronize()
    assert torch.equal(out, expected)


def test_what_it_does_not_take():
    def reason(qkv: Tensor, d: int, queries: bool = False) -> str | None:
        return dispatch.why_not(ATTENTION, "native", AttentionAsk(qkv.device, qkv.dtype, qkv.shape[1], d, queries))

    qkv = torch.empty(1, 50, 384, device="cuda", dtype=BF16)
    assert reason(qkv, 64) is None
    assert "up to 208 tokens" in reason(torch.empty(1, 209, 384, device="cuda", dtype=BF16), 64)
    assert "heads 32, 64, 80 wide" in reason(qkv, 128)
    assert "takes bfloat16, float16" in reason(qkv.float(), 64)
    assert "packed queries" in reason(qkv, 64, queries=True)
    with maefast.backend("native"), pytest.raises(RuntimeError, match="up to 208 tokens"):
        ops.attention(torch.empty(1, 209, 384, device="cuda", dtype=BF16), 2)
    with pytest.raises(ValueError, match="at most 208 tokens"):
        torch.ops.maefast.attention_fwd(None, torch.empty(1, 209, 384, device="cuda", dtype=BF16), 2)
