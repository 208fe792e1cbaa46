"""The products of csrc/cuda/gemm without a GPU: the functions of their epilogues, their entries over plain loops, the choice.

What the kernels themselves compute only a GPU of compute capability 9.0 can tell: tests/gpu/test_gemm.py.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import aot_gemm
import pytest
import torch
import torch.nn.functional as F
from support import LAYOUTS, NATIVE, Calls, at_the_edge
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import maefast
from maefast import _torch, gemm, ops, tuned
from maefast.kernels import _products
from maefast.kernels._products import Size, inputs, plain
from maefast.ops.linear import LinearAsk, Products, input_gradient, is_fused, native_products, product
from maefast.testing.errors import assert_close_to_float64

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent
CXX = shutil.which("g++")
linear_module = sys.modules["maefast.ops.linear"]  # ops.linear is the function
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
EACH_KIND = pytest.mark.parametrize("kind", gemm.KINDS)
needs_emulator = pytest.mark.skipif(CXX is None or not NATIVE, reason="needs g++ and the native library, which defines the ops")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    """The entries, the emulator and products as plain loops in one library; a misaligned access or an overflow is fatal."""
    folder, here = tmp_path_factory.mktemp("gemm"), ROOT / "tests" / "cuda_emulator"
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror", f"-I{here}", "-isystem", TORCH / "include"]
    flags += ["-DMAEFAST_ENTRY", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-ffp-contract=off"]
    flags += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    sources = [here / "emulator.cpp", here / "multiply.cpp", ROOT / "csrc" / "cuda" / "gemm" / "linear.cu"]
    library = folder / "libemulated.so"
    command = [
        CXX,
        *flags,
        "-shared",
        "-x",
        "c++",
        *sources,
        "-Wl,-Bsymbolic",
        f"-L{TORCH / 'lib'}",
        "-ltorch_cpu",
        "-o",
        library,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


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


@needs_emulator
@HALVES
@pytest.mark.parametrize("part", PARTS)
def test_epilogue_functions_of_every_value(emulator, dtype, part):
    v = every(dtype)
    v = v[v.isfinite() & PARTS[part](v)]
    assert v.numel() > 2000
    got = (t.to(dtype) for t in epilogue_functions(emulator, v))
    for name, mine, eager, exact in zip(("gelu", "slope"), got, gelu_and_slope(v), gelu_and_slope(v.double()), strict=True):
        assert_close_to_float64(name, mine, eager, exact)


@needs_emulator
@HALVES
def test_stated_error_bounds(emulator, dtype):
    """What csrc/cuda/gemm/gelu.h says, and half a unit of fp32 where values are large."""
    v = every(dtype)
    v = v[v.isfinite()]
    for mine, exact, bound in zip(epilogue_functions(emulator, v), gelu_and_slope(v.double()), (2.8e-5, 6.4e-5), strict=True):
        assert ((mine.double() - exact).abs() <= bound + exact.abs() * 2**-24).all()


@needs_emulator
@HALVES
def test_where_the_functions_are_exact(emulator, dtype):
    """0 at -infinity with slope 0, infinity with slope 1, NaN for NaN; beyond the polynomials' ends as at infinity."""
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


class _CudaOps:
    """torch.ops.maefast, but with the kernels that are registered for CUDA."""

    def __getattr__(self, name: str):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return lambda *args: getattr(torch.ops.maefast, name).default.redispatch(keys, *args)


cuda = _CudaOps()
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


@needs_emulator
@pytest.mark.usefixtures("emulator", "poisoned")
@HALVES
@EACH_KIND
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_entries(kind, size, dtype):
    cases = [inputs(kind, size, torch.device("cpu"), dtype) for _ in range(8 if size.rows * size.features < 5000 else 2)]
    check(kind, cases)


@needs_emulator
@pytest.mark.usefixtures("emulator", "poisoned")
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


@needs_emulator
@pytest.mark.usefixtures("emulator")
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


@needs_emulator
@pytest.mark.usefixtures("emulator")
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


@needs_emulator
@pytest.mark.usefixtures("emulator")
def test_gelu_in_inference():
    x, weight, bias, _ = inputs("linear", Size(20, 16, 24), torch.device("cpu"), BF16)
    assert torch.equal(cuda.linear_fwd(x, weight, bias, True), cuda.linear_gelu_fwd(x, weight, bias)[0])


@needs_emulator
@pytest.mark.usefixtures("emulator")
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


@needs_emulator
@pytest.mark.usefixtures("emulator")
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


@EACH_KIND
def test_fakes(kind):
    """Shapes, dtypes and strides of what the plain ops give."""
    case = inputs(kind, Size(6, 16, 24), torch.device("cpu"), BF16)
    case = (case[0].view(2, 3, 16), *case[1:3], case[3].view(2, 3, 24))
    x, weight, bias, hidden = (t.to("meta") for t in case)
    fakes = {
        "linear": lambda: (torch.ops.maefast.linear_fwd(x, weight, bias, False),),
        "input_gradient": lambda: (torch.ops.maefast.linear_fwd(x, weight.t(), None, False),),
        "linear_gelu_fwd": lambda: torch.ops.maefast.linear_gelu_fwd(x, weight, bias),
        "linear_gelu_bwd": lambda: torch.ops.maefast.linear_gelu_bwd(x, weight, hidden)[:1],
        "linear_gelu_bwd_sum": lambda: torch.ops.maefast.linear_gelu_bwd(x, weight, hidden, True),
    }
    real = plain(kind, *case)
    if kind == "linear_gelu_bwd_sum":
        real = real[0], real[0].flatten(0, 1).sum(0, dtype=F32)
    assert [(t.shape, t.dtype, t.stride()) for t in fakes[kind]()] == [(t.shape, t.dtype, t.stride()) for t in real]
    assert torch.ops.maefast.linear_gelu_bwd(hidden, weight.new_empty(24, 16), x)[1].shape == (0,)


@pytest.fixture
def hopper(monkeypatch) -> None:
    """A GPU of compute capability 9.0 in name, and a build with the kernels."""
    monkeypatch.setattr(gemm, "HAS_KERNELS", True)
    monkeypatch.setattr(gemm.gpu, "capability", lambda device: (9, 0))


@needs_emulator
@pytest.mark.usefixtures("emulator", "fresh_dynamo")
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


def on_gpu(kind: str, rows: int, depth: int, features: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    weight = (features, depth) if kind in gemm.FORWARD else (depth, features)
    return tuple(torch.empty(shape, dtype=dtype, device="cuda") for shape in ((rows, depth), weight))


@pytest.mark.usefixtures("hopper")
@EACH_KIND
def test_why_not(kind, monkeypatch):
    with FakeTensorMode():
        x, weight = on_gpu(kind, 40, 16, 24)
        assert gemm.why_not(kind, x, weight, BF16) is None
        assert gemm.why_not(kind, x, weight, F16) is None, "autocast's dtype"
        for given, reason in (
            ((x.cpu(), weight.cpu(), BF16), "the products from CUTLASS run on a GPU, x is on cpu"),
            ((x, weight, F32), "the products from CUTLASS are in bfloat16 and float16, not in float32"),
            ((*on_gpu(kind, 0, 16, 24), BF16), "x has no rows"),
            ((*on_gpu(kind, 40, 20, 24), BF16), "take summed values in positive multiples of 8, there are 20"),
            ((*on_gpu(kind, 40, 16, 20), BF16), "take features in positive multiples of 8, there are 20"),
            ((*on_gpu(kind, 40, 16, 0), BF16), "take features in positive multiples of 8, there are 0"),
            ((torch.empty(16, 40, dtype=BF16, device="cuda").t(), weight, BF16), "the strides of x are (1, 40)"),
            ((torch.empty_strided((40, 16), (0, 1), dtype=BF16, device="cuda"), weight, BF16), "the strides of x are (0, 1)"),
            ((torch.empty_strided((40, 16), (18, 1), dtype=BF16, device="cuda"), weight, BF16), "the strides of x are (18, 1)"),
        ):
            assert reason in gemm.why_not(kind, *given)
        apart = torch.empty_strided((40, 16), (32, 1), dtype=BF16, device="cuda")
        assert gemm.why_not(kind, apart, weight, BF16) is None
        monkeypatch.setattr(gemm.gpu, "capability", lambda device: (10, 0))
        assert (
            gemm.why_not(kind, x, weight, BF16) == "the products from CUTLASS need compute capability 9.0, x is on a GPU of 10.0"
        )
        monkeypatch.setattr(gemm, "HAS_KERNELS", False)
        assert gemm.why_not(kind, x, weight, BF16) == "maefast was built without CUTLASS"


@pytest.mark.usefixtures("hopper")
def test_the_table_chooses(monkeypatch):
    entries = (
        tuned.Gemm("9.0", "linear", (10, 16), (20, 32), 40, 1.2, "here"),
        tuned.Gemm("8.0", "linear", (10, 64), (20, 64), 40, 1.2, "here"),
    )
    monkeypatch.setattr(tuned, "_committed", tuned._committed._replace(gemm=entries))
    with FakeTensorMode():
        for size, expected in (
            ((40, 16, 24), True),
            ((39, 16, 24), False),
            ((40, 8, 24), False),
            ((40, 24, 24), False),
            ((40, 16, 16), False),
            ((40, 16, 40), False),
            ((40, 12, 24), False),  # in the range, but no kernel takes it
        ):
            assert gemm.is_faster("linear", *on_gpu("linear", *size), BF16) is expected, size
        assert not gemm.is_faster("linear_gelu_fwd", *on_gpu("linear_gelu_fwd", 40, 16, 24), BF16), "another kind"
        assert not gemm.is_faster("linear", *on_gpu("linear", 40, 16, 24), F32)
        monkeypatch.setattr(_torch, "is_exporting", lambda: True)
        assert not gemm.is_faster("linear", *on_gpu("linear", 40, 16, 24), BF16), "a graph runs on other GPUs too"


def test_committed_sizes():
    """The products of the blocks of ViT-B that were measured, and none that were not."""
    for kind in gemm.KINDS[:4]:
        assert tuned.has_faster_product((9, 0), kind, 201_728, 512, 2048)
        assert tuned.has_faster_product((9, 0), kind, 12_800, 768, 3072)
        assert not tuned.has_faster_product((9, 0), kind, 400, 768, 3072)
        assert not tuned.has_faster_product((9, 0), kind, 201_728, 2048, 512)
        assert not tuned.has_faster_product((8, 0), kind, 201_728, 512, 2048)
    assert not tuned.has_faster_product((9, 0), "linear_gelu_bwd_sum", 201_728, 512, 2048)


@pytest.mark.usefixtures("hopper")
def test_which_linears_ask():
    """What was decided before the fixture is not remembered for a GPU: no other test asks for one."""
    ask = LinearAsk(torch.device("cuda", 7), BF16, BF16, None, BF16)
    assert native_products(ask) == Products(False, False, None, True)
    with maefast.backend("eager"):
        assert native_products(ask) == Products(False, False, None, False)
    assert native_products(ask._replace(device=torch.device("cpu"))).on_gpu is False


@pytest.mark.skipif(not NATIVE, reason="the CPU's kernel stands in for that of the GPU")
@pytest.mark.parametrize(
    "chosen",
    [set(), {"linear"}, {"input_gradient"}, {"linear", "input_gradient"}],
    ids=lambda kinds: "+".join(sorted(kinds)) or "none",
)
def test_linear_takes_what_is_chosen(chosen, monkeypatch):
    """Forward and input gradient, each by itself."""
    monkeypatch.setattr(linear_module, "native_products", lambda ask: Products(False, False, None, True))
    monkeypatch.setattr(gemm, "is_faster", lambda kind, x, weight, dtype: kind in chosen and dtype == BF16)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((5, 16), (24, 16), (24,)))
    with Calls() as calls, torch.autocast("cpu", BF16):
        out = ops.linear(x, weight, bias)
    assert calls.names == ["linear_fwd"] * ("linear" in chosen)
    with Calls() as calls:
        dx, dweight, dbias = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    assert calls.names == ["linear_fwd"] * ({"linear", "input_gradient"} <= chosen), "where forward is torch's, so is backward"
    with torch.autocast("cpu", BF16):
        expected = F.linear(x, weight, bias)
    for mine, theirs in zip(
        (out, dx, dweight, dbias),
        (expected, *torch.autograd.grad(expected, (x, weight, bias), torch.ones_like(out))),
        strict=True,
    ):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not NATIVE, reason="the CPU's kernel stands in for that of the GPU")
def test_products_of_a_block(monkeypatch):
    x, weight, bias, _ = inputs("linear", Size(40, 16, 24), torch.device("cpu"), BF16)
    on = Products(False, False, None, True)
    monkeypatch.setattr(gemm, "is_faster", lambda kind, *_: kind == "linear_gelu_fwd")
    with Calls() as calls:
        product(x, weight, bias, on)
        input_gradient(x, weight.t().contiguous(), on)
    assert calls.names == []
    with Calls() as calls:
        product(x, weight, bias, on, gelu=True)
    assert calls.names == ["linear_fwd"]
    assert is_fused("linear_gelu_fwd", x, weight, on)
    assert not is_fused("linear_gelu_bwd", x, weight, on)
    assert not is_fused("linear_gelu_fwd", x, weight, on._replace(on_gpu=False))


@pytest.mark.skipif(not NATIVE, reason="the CPU's kernel stands in for that of the GPU")
@pytest.mark.usefixtures("hopper", "fresh_dynamo")
def test_compiled_code_sees_through_the_choice(monkeypatch):
    """One graph for each number of rows that the table knows; an exported one keeps to torch's product."""
    entry = tuned.Gemm("9.0", "linear", (16, 16), (24, 24), 40, 1.2, "here")
    monkeypatch.setattr(tuned, "_committed", tuned._committed._replace(gemm=(entry, entry._replace(kind="input_gradient"))))
    monkeypatch.setattr(linear_module, "native_products", lambda ask: Products(False, False, None, True))
    monkeypatch.setattr(gemm, "_DEVICE", "cpu")
    graphs = []

    def backend(graph, example):
        graphs.append("maefast.linear_fwd" in graph.print_readable(print_output=False))
        return graph

    linear = torch.compile(ops.linear, fullgraph=True, backend=backend, dynamic=False)
    weight, bias = torch.randn(24, 16).bfloat16(), torch.randn(24).bfloat16()
    for rows in (40, 39):
        assert linear(torch.randn(rows, 16).bfloat16(), weight, bias).shape == (rows, 24)
    assert graphs == [True, False]

    class Layer(torch.nn.Module):
        def forward(self, x):
            return ops.linear(x, weight, bias)

    exported = torch.export.export(Layer(), (torch.randn(40, 16).bfloat16(),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert "maefast" not in str(exported.graph)
    assert exported.module()(torch.randn(7, 16).bfloat16()).shape == (7, 24)


def test_sizes_that_are_timed():
    """Those of the committed table are among them."""
    for entry in tuned.read().gemm:
        assert (entry.depth[1], entry.features[1]) in {size[1:] for size in _products.sizes(entry.kind)}


EPILOGUES = {"linear": "bias", "input_gradient": "none", "linear_gelu_fwd": "gelu", "linear_gelu_bwd": "gelu_slope"}


def test_each_instantiation_is_a_file_and_is_built():
    names = {f"{kind}_{dtype}" for kind in EPILOGUES for dtype in ("bf16", "f16")}
    assert set(aot_gemm.sources()) == names
    listed = re.findall(r"csrc/cuda/gemm/(\w+)\.cu", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(listed) == sorted({*names, "linear"})
    for name, path in aot_gemm.sources().items():
        kind, dtype = name.rsplit("_", 1)
        made = re.findall(r"multiply<maefast::cuda::gemm::Epilogue::(\w+), maefast::cuda::DType::(\w+)>", path.read_text())
        assert made == [(EPILOGUES[kind], dtype)]
    assert {f"`{name}`" for name in names} <= set(re.findall("`[^`]+`", (ROOT / "docs" / "notes" / "linear.md").read_text()))


GOOD = {"HGMMA.64": 16, "UTMALDG.3D": 2, "UTMASTG.3D": 8, "STSM.16.MT88.4": 16}


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("linear_bf16", {}, None),
        ("linear_gelu_bwd_bf16", {"instructions": GOOD | {"STG.E": 4}}, None),
        ("linear_bf16", {"instructions": GOOD | {"STG.E": 4}}, "linear_bf16 has STG.E"),
        ("linear_gelu_bwd_bf16", {"instructions": GOOD | {"STG.E.U16": 4}}, "linear_gelu_bwd_bf16 has STG.E.U16"),
        ("linear_bf16", {"instructions": GOOD | {"STSM.16.MT88.2": 4}}, "linear_bf16 has STSM.16.MT88.2"),
        ("linear_bf16", {"instructions": GOOD | {"STL.64": 4}}, "linear_bf16 has STL.64"),
        ("linear_bf16", {"instructions": {"HGMMA.64": 1, "UTMALDG.3D": 1}}, "nothing in linear_bf16 writes by TMA"),
        ("linear_bf16", {"stack": 8}, "linear_bf16 keeps 8 bytes a thread in local memory"),
        ("linear_bf16", {"registers": 170}, "linear_bf16 takes 170 registers, there are 168"),
        ("linear_bf16", {"warnings": ("(C7510) Potential Performance Loss",)}, "linear_bf16: (C7510) Potential Performance Loss"),
    ],
)
def test_what_the_machine_code_must_not_have(name, changes, problem):
    kernel = aot_gemm.Kernel(name, 168, 0, (), GOOD)._replace(**changes)
    assert aot_gemm.problems_of(kernel) == ([] if problem is None else [problem])
