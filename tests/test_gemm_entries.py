"""csrc/cuda/gemm without a GPU: the functions of the epilogues on every value, and the entries over
products as plain loops.

tests/gpu/test_gemm.py holds the kernels themselves, on a GPU of compute capability 9.0.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from emulated import HERE, compiled, cuda, linked, needs_emulator
from support import LAYOUTS, at_the_edge
from torch import Tensor

from maefast import gemm
from maefast.kernels.tune.products import Size, inputs, plain
from maefast.testing.errors import assert_close_to_float64

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
EACH_KIND = pytest.mark.parametrize("kind", gemm.KINDS)
pytestmark = [needs_emulator, pytest.mark.usefixtures("emulator")]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("gemm")
    gemm = linked(folder) / "gemm"
    instances = gemm / "instances.cpp"
    instances.write_text("".join(f'#include "{path.name}"\n' for path in sorted(gemm.glob("*_*.cu"))))
    return compiled(folder, [HERE / "multiply.cpp", gemm / "linear.cu", instances], "-ffp-contract=off")


def every(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit dtype, infinities and NaN among them."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def epilogue_functions(emulator: ctypes.CDLL, v: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its slope in fp32."""
    v = v.float().contiguous()
    out = torch.empty_like(v), torch.empty_like(v)
    emulator.epilogue_functions(*(ctypes.c_void_p(t.data_ptr()) for t in (v, *out)), ctypes.c_int64(v.numel()))
    return out


def gelu_and_slope(v: Tensor) -> tuple[Tensor, Tensor]:
    v = v.detach().requires_grad_()
    y = F.gelu(v)
    return y.detach(), torch.autograd.grad(y.sum(), v)[0]


PARTS = {  # of the finite values; where all count, the largest hide the others
    "all": lambda v: v == v,
    "negative": lambda v: (v <= 0) & (v >= -8),
    "positive": lambda v: (v >= 0) & (v <= 8),
    "small": lambda v: v.abs() <= 0.125,
}


@HALVES
@pytest.mark.parametrize("part", PARTS)
def test_epilogue_functions_of_every_value(emulator, dtype, part):
    v = every(dtype)
    v = v[v.isfinite() & PARTS[part](v)]
    assert v.numel() > 2000
    got = (t.to(dtype) for t in epilogue_functions(emulator, v))
    for name, mine, eager, exact in zip(("gelu", "slope"), got, gelu_and_slope(v), gelu_and_slope(v.double()), strict=True):
        assert_close_to_float64(name, mine, eager, exact)


@HALVES
def test_stated_error_bounds(emulator, dtype):
    """What csrc/cuda/gemm/gelu.h says, and half a unit of fp32 where values are large."""
    v = every(dtype)
    v = v[v.isfinite()]
    for mine, exact, bound in zip(epilogue_functions(emulator, v), gelu_and_slope(v.double()), (2.8e-5, 6.4e-5), strict=True):
        assert ((mine.double() - exact).abs() <= bound + exact.abs() * 2**-24).all()


@HALVES
def test_where_the_functions_are_exact(emulator, dtype):
    """0 with slope 0 at -infinity, infinity with slope 1, NaN for NaN."""
    v = every(dtype)
    gelu, slope = epilogue_functions(emulator, v)
    assert torch.equal(gelu.isnan(), v.isnan())
    assert torch.equal(slope.isnan(), v.isnan())
    left, right = v <= -4.5625, v >= 4.5625
    assert not gelu[left].any()
    assert not slope[left].any()
    assert torch.equal(gelu[right], v[right].float())
    assert (slope[right] == 1).all()
    assert left.sum() > 2000
    assert gelu[v == 0].eq(0).all()
    assert slope[v == 0].eq(0.5).all()


ENTRIES = {
    "linear": lambda x, weight, bias, hidden: (cuda.linear_fwd(x, weight, bias, False),),
    "linear_gelu_fwd": lambda x, weight, bias, hidden: cuda.linear_gelu_fwd(x, weight, bias),
    "input_gradient": lambda x, weight, bias, hidden: (cuda.linear_fwd(x, weight.t(), None, False),),
    "linear_gelu_bwd": lambda x, weight, bias, hidden: cuda.linear_gelu_bwd(x, weight, hidden, False)[:1],
    "linear_gelu_bwd_sum": lambda x, weight, bias, hidden: cuda.linear_gelu_bwd(x, weight, hidden, True),
}
# rows, depth, features: one of each, nothing a multiple of a tile, several tiles
SIZES = [Size(1, 8, 8), Size(7, 24, 56), Size(50, 64, 200), Size(300, 16, 136), Size(130, 264, 8)]


def check(kind: str, cases: list[tuple[Tensor, ...]], layout=lambda t: t) -> None:
    results = [
        (ENTRIES[kind](*map(layout, case)), plain(kind, *case), plain(kind, *(t.double() for t in case))) for case in cases
    ]
    for place in range(len(results[0][0])):
        got, eager, exact = (torch.stack([result[i][place] for result in results]) for i in range(3))
        assert got.dtype == eager.dtype
        assert_close_to_float64(f"{kind} {place}", got, eager, exact)


@pytest.mark.usefixtures("poisoned")
@HALVES
@EACH_KIND
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_entries(kind, size, dtype):
    cases = [inputs(kind, size, torch.device("cpu"), dtype) for _ in range(8 if size.rows * size.features < 5000 else 2)]
    check(kind, cases)


@pytest.mark.usefixtures("poisoned")
@EACH_KIND
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), lambda t: t[:1].expand(t.shape)], ids=[*LAYOUTS, "expanded"])
def test_entries_of_strided_tensors(kind, layout):
    """Whatever TMA cannot step through is copied; the loops refuse it."""

    def laid(t: Tensor) -> Tensor:
        return layout(t) if t.dim() > 1 else t

    cases = []
    for _ in range(8):
        x, weight, bias, hidden = inputs(kind, Size(20, 40, 72), torch.device("cpu"), BF16)
        cases.append((laid(x).contiguous(), laid(weight).contiguous(), bias, laid(hidden).contiguous()))
    check(kind, cases, laid)


@EACH_KIND
def test_rows_that_are_apart_are_read_where_they_lie(kind):
    """Up against pages that may not be touched; leading dimensions are kept."""
    x, weight, bias, hidden = inputs(kind, Size(6, 16, 24), torch.device("cpu"), BF16)
    wide = torch.full((6, 32), torch.nan, dtype=BF16)
    wide[:, 8:24] = x
    expected = ENTRIES[kind](x, weight, bias, hidden)
    for end in (False, True):
        apart = at_the_edge(wide, end)[:, 8:24]
        edges = (at_the_edge(t, end) for t in (weight, bias, hidden))
        for mine, theirs in zip(ENTRIES[kind](apart, *edges), expected, strict=True):
            assert torch.equal(mine, theirs)
    shaped = ENTRIES[kind](x.view(2, 3, 16), weight, bias, hidden.view(2, 3, 24))
    for mine, theirs in zip(shaped, expected, strict=True):
        assert torch.equal(mine, theirs.view(2, 3, 24) if theirs.dim() == 2 else theirs)


@HALVES
def test_bias(dtype):
    """In fp32 it is not rounded; in the dtype of x it is the same; without one nothing is added."""
    x, weight, _, _ = inputs("linear", Size(20, 16, 24), torch.device("cpu"), dtype)
    bias = torch.randn(24)
    exact = F.linear(x.double(), weight.double(), bias.double())
    wide = cuda.linear_fwd(x, weight, bias, False)
    assert torch.equal(wide, exact.float().to(dtype)), "rounded once"
    assert torch.equal(
        cuda.linear_fwd(x, weight, bias.to(dtype), False), cuda.linear_fwd(x, weight, bias.to(dtype).float(), False)
    )
    without = cuda.linear_fwd(x, weight, None, False)
    assert torch.equal(without, cuda.linear_fwd(x, weight, torch.zeros(24), False))
    assert torch.equal(without, cuda.linear_fwd(x, weight.t().contiguous().t(), None, False)), "by the kernel of the gradient"
    transposed = cuda.linear_fwd(x, weight.t().contiguous().t(), bias, False)
    assert torch.equal(transposed, wide)


def test_gelu_in_inference():
    x, weight, bias, _ = inputs("linear", Size(20, 16, 24), torch.device("cpu"), BF16)
    assert torch.equal(cuda.linear_fwd(x, weight, bias, True), cuda.linear_gelu_fwd(x, weight, bias)[0])


@EACH_KIND
@pytest.mark.parametrize(("rows", "features"), [((0,), 24), ((2, 0), 24), ((3,), 0), ((0,), 0)], ids=str)
def test_nothing_to_do(kind, rows, features):
    weight = torch.empty((features, 16) if kind in gemm.FORWARD else (16, features), dtype=BF16)
    if kind not in gemm.FORWARD and features == 0:
        pytest.skip("a weight of no columns has no row that TMA reads")
    results = ENTRIES[kind](
        torch.empty(*rows, 16, dtype=BF16), weight, torch.empty(features), torch.empty(*rows, features, dtype=BF16)
    )
    assert results[0].shape == (*rows, features)
    if kind == "linear_gelu_bwd_sum":
        assert torch.equal(results[1], torch.zeros(features))


def test_what_the_entries_refuse(emulator):
    def t(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    half = (t(3, 16), t(24, 16), t(24))
    for args, message in (
        ((t(3, 16, dtype=F32), t(24, 16, dtype=F32), None), "x must be bfloat16 or float16"),
        ((t(3, 16), t(24, 16, dtype=F16), None), "weight must have the dtype of x"),
        ((t(3, 16), t(24, 8), None), r"x must be \(..., in\) for a weight \(out, in\)"),
        ((t(3, 16), t(24 * 16), None), r"x must be \(..., in\) for a weight \(out, in\)"),
        ((torch.zeros((), dtype=BF16), t(24, 16), None), r"x must be \(..., in\) for a weight \(out, in\)"),
        ((t(3, 12), t(24, 12), None), "the last dimension of x must be a positive multiple of 8, it is 12"),
        ((t(3, 0), t(24, 0), None), "the last dimension of x must be a positive multiple of 8, it is 0"),
        ((t(3, 16), t(20, 16), None), "features .* must be a multiple of 8, they are 20"),
        ((t(3, 16), t(24, 16), t(25)), r"bias must be \(out,\) = \(24,\)"),
        ((t(3, 16), t(24, 16), t(24, dtype=F16)), "bias must be float32 or have the dtype of x"),
    ):
        for call in (lambda *a: cuda.linear_fwd(*a, False), cuda.linear_gelu_fwd):
            with pytest.raises((ValueError, RuntimeError), match=message):
                call(*args)
    with pytest.raises((ValueError, RuntimeError), match="dtype must be that of x on a GPU"):
        cuda.linear_fwd(*half, False, F32)
    for args, message in (
        ((t(3, 16), t(24, 16), t(3, 16)), r"x must be \(..., in\)"),
        ((t(3, 24), t(24, 16), t(4, 16)), "hidden must be .* with the rows of dy"),
        ((t(3, 24), t(24, 16), t(3, 24)), "hidden must be .* with the rows of dy"),
        ((t(3, 24), t(24, 16), t(3, 16, dtype=F16)), "hidden must have the dtype of dy"),
        ((t(3, 24), t(24, 12), t(3, 12)), "the last dimension of weight must be a positive multiple of 8, it is 12"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            cuda.linear_gelu_bwd(*args, False)
    emulator.emulator_capability(8)
    try:
        with pytest.raises((ValueError, RuntimeError), match=r"need compute capability 9\.0, the GPU has 8\.0"):
            cuda.linear_fwd(*half, False)
    finally:
        emulator.emulator_capability(9)


@pytest.mark.usefixtures("fresh_dynamo")
@HALVES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_opcheck(dtype, bias):
    """The entries of CUDA under the CPU's key, against their schemas and fakes."""
    library = torch.library.Library("maefast", "IMPL")
    try:
        for name in ("linear_gelu_fwd", "linear_gelu_bwd"):
            library.impl(name, getattr(cuda, name), "CPU")
        x, weight, b, _ = inputs("linear_gelu_fwd", Size(6, 16, 24), torch.device("cpu"), dtype)
        for shape in ((6, 16), (2, 3, 16)):
            torch.library.opcheck(torch.ops.maefast.linear_gelu_fwd.default, (x.view(shape), weight, b if bias else None))
        dy, weight, _, hidden = inputs("linear_gelu_bwd", Size(6, 16, 24), torch.device("cpu"), dtype)
        for with_sum in (False, True):
            torch.library.opcheck(torch.ops.maefast.linear_gelu_bwd.default, (dy, weight, hidden, with_sum))
    finally:
        library._destroy()
