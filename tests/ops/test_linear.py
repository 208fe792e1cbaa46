import itertools
from typing import Any

import pytest
import support
import torch
import torch.nn.functional as F
from op_inputs import BF16, F16, F32, Inputs
from specs import PRODUCTS, SPECS
from support import Calls, assert_equal, forward_backward, set_fact
from torch import Tensor

import maefast
from maefast import cpu, dispatch, ops
from maefast.ops.linear import OP as LINEAR
from maefast.ops.linear import Products, native_products, product, weight_gradient
from maefast.testing.errors import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("poisoned")

CPU = torch.device("cpu")
NATIVE = Products(True, True, 0)


def make(shape: tuple[int, ...], features: int, dtype: torch.dtype = F32, bias: bool = True) -> Inputs:
    return SPECS["linear"].make((dtype, dtype if bias else None), shape, features)


def test_by_hand(each_backend):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 10.0], [0.0, -1.0], [5.0, 0.0]], requires_grad=True)
    bias = torch.tensor([100.0, 200.0, 300.0], requires_grad=True)
    out = ops.linear(x, weight, bias)
    assert out.tolist() == [[121.0, 198.0, 305.0], [143.0, 196.0, 315.0]]
    out.backward(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]))
    assert x.grad.tolist() == [[1.0, 8.0], [5.0, -1.0]]
    assert weight.grad.tolist() == [[1.0, 2.0], [5.0, 8.0], [3.0, 4.0]]
    assert bias.grad.tolist() == [1.0, 3.0, 1.0]


def check_gelu(cases: int, shape: tuple[int, ...], features: int, **options: Any) -> bool:
    """Hold GELU of a product to the error rule; return whether its bits are torch's."""
    results: list[list[Tensor]] = []
    for _ in range(cases):
        inputs = {name: t.detach() for name, t in make(shape, features, **options).items()}
        x, weight, bias = inputs["x"], inputs["weight"], inputs.get("bias")
        exact = F.gelu(F.linear(**SPECS["linear"].exact(inputs)))
        results.append([product(x, weight, bias, NATIVE, gelu=True), F.gelu(F.linear(x, weight, bias)), exact])
    assert_close_to_float64("gelu(linear)", *(torch.stack(column) for column in zip(*results, strict=True)))
    return all(torch.equal(got, eager) for got, eager, _ in results)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("size", PRODUCTS, ids=str)
def test_gelu_in_the_product(isa, size, bias):
    """Inference: GELU of the whole sum, whatever parts it comes in."""
    rows, depth, features = size
    check_gelu(64 if rows * features == 1 else 8, (rows, depth), features, bias=bias)  # eager may be exact by chance


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_gelu_of_a_product_in_halves(isa, dtype):
    """In the product's epilogue for bf16 where the CPU multiplies pairs, else torch's two ops."""
    is_torchs = check_gelu(8, (29, 70), 55, dtype=dtype)
    assert is_torchs or (dtype == BF16 and isa == "avx512bf16")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_a_weight_of_several_parts(native, dtype):
    """More columns and depth than are packed at once, and more rows than a task has."""
    SPECS["linear"].check([make((290, 2100), 2300, dtype)], (dtype, dtype), shape=(290, 2100), features=2300)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 4, 6), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("features", [5, 0])
def test_nothing_to_do(each_backend, shape, features):
    inputs = make(shape, features)
    out = ops.linear(**inputs)
    assert_equal(out, inputs["bias"].expand(*shape[:-1], features))
    dbias = torch.full((features,), float(out.numel() // max(features, 1)))
    grads = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert_equal(grads, (torch.zeros(shape), torch.zeros(features, shape[-1]), dbias))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_autocast(each_backend, dtype, bias):
    """Values are those of inputs that were cast; gradients have the dtypes of their inputs."""
    inputs = make((3, 7, 20), 11, bias=bias)
    narrow = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    dy = torch.randn(3, 7, 11)
    got = forward_backward(torch.autocast("cpu", dtype)(ops.linear), inputs, dy)  # backward lies outside
    assert [t.dtype for t in got.values()] == [dtype] + [F32] * len(inputs)
    rounded = {name: t.to(dtype) for name, t in got.items()}  # a weight's gradient may have been summed in fp32
    assert_equal(rounded, forward_backward(ops.linear, narrow, dy))


def test_autocast_leaves_float64_alone():
    inputs = SPECS["linear"].exact(make((3, 4), 5))
    with torch.autocast("cpu", BF16):
        assert_equal(ops.linear(**inputs), F.linear(**inputs))


def test_autocast_casts_the_weight_once(native):
    inputs = make((3, 4), 5)
    with maefast.backend("native"), torch.autocast("cpu", BF16):
        out = ops.linear(**inputs)
    expected = torch.ones(3, 5).bfloat16() @ inputs["weight"].detach().bfloat16()
    with torch.no_grad():
        inputs["weight"].zero_()
    (dx,) = torch.autograd.grad(out.sum(), inputs["x"])
    assert torch.equal(dx, expected.float())


def test_autocast_sums_the_gradient_of_a_weight_in_fp32():
    """Where the CPU multiplies pairs of bf16, an fp32 weight's gradient is not rounded to bf16."""
    if not support.NATIVE or maefast._C.cpu_isa() != "avx512bf16":
        pytest.skip("this CPU does not multiply pairs of bf16")
    inputs, dy = make((300, 20), 11), torch.randn(300, 11).bfloat16()
    with maefast.backend("native"), torch.autocast("cpu", BF16):
        (grad,) = torch.autograd.grad(ops.linear(**inputs), inputs["weight"], dy)
    exact_grad = dy.double().t() @ inputs["x"].detach().bfloat16().double()
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-6, atol=1e-4)


def test_which_backend(native, monkeypatch):
    """auto takes native for fp32 with AVX-512, for bf16 with AVX512_BF16, for neither on Intel."""
    x32, x16, h16, x64 = (LINEAR.example(CPU, dtype) for dtype in (F32, BF16, F16, torch.float64))
    for intel, wide, pairs in itertools.product((False, True), repeat=3):
        set_fact(monkeypatch, cpu, "IS_INTEL", intel)
        set_fact(monkeypatch, cpu, "has_avx512", lambda wide=wide: wide)
        set_fact(monkeypatch, cpu, "multiplies_bf16", lambda pairs=pairs: pairs)
        chosen = [dispatch.choose(LINEAR, ask) for ask in (x32, x16, h16, x64)]
        assert chosen == ["native" if own and not intel else "eager" for own in (wide, pairs, False, False)]
        with maefast.backend("native"):
            assert [dispatch.choose(LINEAR, ask) for ask in (x32, x16)] == ["native", "native"]
            with pytest.raises(RuntimeError, match=r"linear cannot run.*native.*float64"):
                dispatch.choose(LINEAR, x64)


def test_which_products(native, monkeypatch):
    """auto leaves the input's gradient in bf16 and the weight's of few rows to torch."""
    set_fact(monkeypatch, cpu, "IS_INTEL", False)
    for name in ("has_avx512", "multiplies_bf16"):
        set_fact(monkeypatch, cpu, name, lambda: True)
    chosen = {dtype: native_products(LINEAR.example(CPU, dtype)) for dtype in (F32, BF16, F16)}
    assert chosen == {F32: Products(True, True, 256), BF16: Products(True, False, 256), F16: Products(False, False, None)}
    for rows, dtype in itertools.product((254, 256), chosen):
        dy, x = torch.randn(2, rows // 2, 5).to(dtype), torch.randn(2, rows // 2, 3).to(dtype)
        with Calls() as calls:
            weight_gradient(dy, x, dtype, chosen[dtype])
        assert calls.names == ["linear_fwd"] * (rows == 256 and dtype != F16)
    with maefast.backend("native"):
        assert native_products(LINEAR.example(CPU, F16)) == NATIVE


def test_eager_is_torch():
    inputs = make((3, 7, 20), 11)
    dy = torch.randn(3, 7, 11)
    with maefast.backend("eager"):
        assert_equal(forward_backward(ops.linear, inputs, dy), forward_backward(F.linear, inputs, dy))


def test_frozen_parameters_cost_nothing(native):
    inputs = make((3, 20), 9)
    with maefast.backend("native"):
        out = ops.linear(inputs["x"], inputs["weight"].detach(), inputs["bias"].detach())
        with Calls() as calls:
            out.sum().backward()
    assert calls.names == ["linear_fwd"]
    assert inputs["weight"].grad is None


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_nan_and_infinity_pass(isa, dtype):
    """A row's NaN stays in its row, a column's in its column; padding adds neither."""
    inputs = {name: t.detach() for name, t in make((20, 50), 70, dtype).items()}
    inputs["x"][3, 7], inputs["x"][5, 0] = torch.nan, torch.inf
    inputs["weight"][11, 49] = torch.nan
    with maefast.backend("native"):
        out = ops.linear(**inputs)
    nan = torch.zeros(20, 70, dtype=torch.bool)
    nan[3], nan[:, 11] = True, True
    assert torch.equal(out.isnan(), nan)
    assert out[5].isinf().sum() == 69


@pytest.mark.huge
def test_more_than_2_31_elements(native):
    """Rows that are one and the same in memory, and their gradients' sum."""
    rows, depth = 4_300_000, 500
    x = torch.randint(-4, 5, (1, depth)).float().expand(rows, -1)
    assert x.numel() > 2**31
    weight = torch.randint(-4, 5, (1, depth)).float()
    out = torch.ops.maefast.linear_fwd(x, weight, None, False)
    assert torch.equal(out, (weight @ x[0]).expand(rows, 1))  # whole numbers below 2^24
    dweight = torch.ops.maefast.linear_fwd(torch.ones(rows, 1).t(), x.t(), None, False)
    assert torch.equal(dweight, x[:1] * rows)
