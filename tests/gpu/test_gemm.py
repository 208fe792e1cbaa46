"""The products of csrc/cuda/gemm on compute capability 9.0, at sizes that no tile divides."""

import pytest
import torch
import torch.nn.functional as F
from support import assert_equal
from torch import Tensor

import maefast
from maefast import _torch, gemm, ops, tuned
from maefast.kernels.tune.products import Size, inputs, plain
from maefast.ops.linear import Products, input_gradient, product
from maefast.testing.errors import assert_close_to_float64

pytestmark = pytest.mark.skipif(
    not gemm.HAS_KERNELS or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0 and a build with CUTLASS",
)

BF16, F16 = torch.bfloat16, torch.float16
DEVICE = torch.device("cuda")
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
EACH_KIND = pytest.mark.parametrize("kind", gemm.KINDS)
# One row, a whole tile, one more of each, one step of the sum, odd numbers of steps and of tiles
SIZES = [(1, 8, 8), (128, 64, 128), (129, 72, 136), (1000, 8, 264), (197, 776, 384), (4097, 512, 2048), (2500, 1280, 5120)]
CALLS = {
    "linear": lambda x, weight, bias, hidden: (torch.ops.maefast.linear_fwd(x, weight, bias, False),),
    "linear_gelu_fwd": lambda x, weight, bias, hidden: torch.ops.maefast.linear_gelu_fwd(x, weight, bias),
    "input_gradient": lambda x, weight, bias, hidden: (torch.ops.maefast.linear_fwd(x, weight.t(), None, False),),
    "linear_gelu_bwd": lambda x, weight, bias, hidden: torch.ops.maefast.linear_gelu_bwd(x, weight, hidden)[:1],
    "linear_gelu_bwd_sum": lambda x, weight, bias, hidden: torch.ops.maefast.linear_gelu_bwd(x, weight, hidden, True),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.cuda.manual_seed(0)


@HALVES
@EACH_KIND
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_sizes(kind, size, dtype):
    case = inputs(kind, Size(*size), DEVICE, dtype)
    exact = plain(kind, *(t.double() for t in case))
    for place, results in enumerate(zip(CALLS[kind](*case), plain(kind, *case), exact, strict=True)):
        assert results[0].dtype == results[1].dtype
        assert_close_to_float64(f"{kind} {place}", *results)


@EACH_KIND
def test_deterministic(kind):
    case = inputs(kind, Size(3001, 768, 3072), DEVICE, BF16)
    first = CALLS[kind](*case)
    for _ in range(3):
        assert_equal(CALLS[kind](*case), first)


@EACH_KIND
def test_rows_that_are_apart(kind):
    x, *rest = inputs(kind, Size(300, 64, 136), DEVICE, BF16)
    wide = torch.full((300, 96), torch.nan, device=DEVICE, dtype=BF16)
    wide[:, 16:80] = x
    misaligned = torch.empty(x.numel() + 1, device=DEVICE, dtype=BF16)[1:].view(x.shape).copy_(x)  # which is copied
    for view in (wide[:, 16:80], misaligned):
        assert_equal(CALLS[kind](view, *rest), CALLS[kind](x, *rest))


@EACH_KIND
def test_in_a_cuda_graph(kind):
    """Captured once, replayed on other values."""
    case = inputs(kind, Size(1000, 64, 136), DEVICE, BF16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        CALLS[kind](*case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = CALLS[kind](*case)
    for t in case:
        t.copy_(torch.randn_like(t))
    graph.replay()
    assert_equal(captured, CALLS[kind](*case))


@EACH_KIND
def test_on_another_stream(kind):
    case = inputs(kind, Size(1000, 64, 136), DEVICE, BF16)
    expected = CALLS[kind](*case)
    late = [torch.zeros_like(t) for t in case]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _torch.sleep_on_gpu(20_000_000)
        for mine, theirs in zip(late, case, strict=True):
            mine.copy_(theirs)
        got = CALLS[kind](*late)
    side.synchronize()
    assert_equal(got, expected)


@HALVES
def test_infinities_and_nan(dtype):
    """In the row that they are in, and in no other; GELU's limits."""
    x, weight, bias, hidden = inputs("linear_gelu_fwd", Size(300, 64, 136), DEVICE, dtype)
    x[3, 7], x[200, 0] = torch.nan, torch.inf
    y, h = torch.ops.maefast.linear_gelu_fwd(x, weight, bias)
    rows = torch.zeros(300, 136, dtype=torch.bool, device=DEVICE)
    rows[3] = True
    assert torch.equal(h.isnan(), rows)
    assert torch.equal(y.isnan(), rows)
    assert h[200].isinf().all()
    assert torch.equal(y[200], h[200].clamp(min=0))
    hidden[5], hidden[6], hidden[7] = torch.inf, -torch.inf, torch.nan
    dy = torch.randn(300, 64, device=DEVICE, dtype=dtype)
    dhidden, _ = torch.ops.maefast.linear_gelu_bwd(dy, weight.t().contiguous(), hidden)
    plain_gradient = torch.ops.maefast.linear_fwd(dy, weight, None, False)
    assert torch.equal(dhidden[5], plain_gradient[5])
    assert not dhidden[6].any()
    assert dhidden[7].isnan().all()


def test_out_of_range_leaves_no_error_behind():
    with pytest.raises((ValueError, RuntimeError), match="positive multiple of 8"):
        torch.ops.maefast.linear_fwd(*(torch.zeros(16, 12, device=DEVICE, dtype=BF16) for _ in range(2)), None, False)
    torch.zeros(1, device=DEVICE).item()


def test_linear_takes_them_by_the_table(monkeypatch):
    """ops.linear at a size of the table, forward and backward, against the reference."""
    monkeypatch.setattr(tuned, "_committed", tuned.read())
    entry = next(entry for entry in tuned.read().gemm if entry.kind == "linear")
    rows, depth, features = entry.rows + 1, entry.depth[1], entry.features[1]
    x, weight, bias, _ = inputs("linear", Size(rows, depth, features), DEVICE, BF16)
    assert gemm.is_faster("linear", x, weight, BF16)
    leaves = [t.float().requires_grad_() for t in (x, weight, bias)]
    dy = torch.randn(rows, features, device=DEVICE, dtype=BF16)

    def run(leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
        out = ops.linear(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dy)]

    with torch.autocast("cuda", BF16):
        got = run(leaves, dy)
        with maefast.backend("eager"):
            eager = run(leaves, dy)
    exact = run([t.detach().double().requires_grad_() for t in leaves], dy.double())
    for name, mine, theirs, truth in zip(("out", "dx", "dweight", "dbias"), got, eager, exact, strict=True):
        assert_close_to_float64(name, mine, theirs, truth)


def test_what_the_table_leaves_to_cublas():
    x, weight, bias, _ = inputs("linear", Size(400, 512, 2048), DEVICE, BF16)
    on = Products(False, False, None, True)
    assert torch.equal(product(x, weight, bias, on), F.linear(x, weight, bias))
    assert torch.equal(input_gradient(x, weight.t().contiguous(), on), x @ weight.t().contiguous())
