import math

import pytest
import torch
from op_inputs import BF16, F16, F32, F64, GELU_DTYPES, Inputs
from specs import SPECS
from support import assert_equal
from torch import Tensor

from maefast import ops
from maefast.testing.errors import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("poisoned")


def make(*shape: int, dtypes: tuple[torch.dtype | None, ...] = GELU_DTYPES["fp32"]) -> Inputs:
    return SPECS["bias_gelu"].make(dtypes, shape)


def test_reference_is_the_definition():
    x, bias = make(50, 5).values()
    for value, y in zip((x.double() + bias.double()).flatten(), ops.bias_gelu_ref(x.double(), bias).flatten(), strict=True):
        assert y.item() == pytest.approx(0.5 * value.item() * math.erfc(-value.item() / math.sqrt(2)), rel=1e-12, abs=1e-15)


def test_many_values(isa):
    """More than a stack would hold, if each took some of it."""
    x = torch.randn(1024, 1024, requires_grad=True)
    y = ops.bias_gelu(x, None)
    (dx,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    exact = ops.bias_gelu_ref(wide, None)
    expected = (exact, *torch.autograd.grad(exact.sum(), wide))
    torch.testing.assert_close((y.double(), dx.double()), expected, rtol=1e-5, atol=1e-6)


RANGES = [
    (-14.0, 14.0),
    (-1.0, 1.0),
    (-1e-3, 1e-3),
    (-1e-20, 1e-20),
    (-6.0, -4.0),
    (4.0, 6.0),
    (-0.8, -0.7),
]  # slope 0 in the last


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("limits", RANGES, ids=str)
def test_everywhere(isa, limits, dtype):
    """Each part of the curve is held to the rule by itself: large values would hide small ones."""
    x = torch.linspace(*limits, 20_000).to(dtype).requires_grad_()
    SPECS["bias_gelu"].check([{"x": x}], (dtype,), shape=x.shape)


def test_the_tail_keeps_its_digits(isa):
    """1 + erf loses them: at -6 half the digits of fp32, and at -8 nothing is left."""
    x = torch.linspace(-13.0, -3.0, 5000, dtype=F64).float().requires_grad_()
    y = ops.bias_gelu(x, None)
    (dx,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double()
    cdf, density = torch.special.erfc(-wide / 2**0.5) / 2, torch.exp(-(wide**2) / 2) / (2 * math.pi) ** 0.5
    assert ((y.double() / (wide * cdf) - 1).abs() < 2e-5).all()
    assert ((dx.double() / (cdf + wide * density) - 1).abs() < 2e-5).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("D", [1, 40])
def test_limits(isa, D, dtype):
    far = [torch.inf, -torch.inf, 60_000.0, -60_000.0, 20.0, -20.0, 0.0, -0.0]
    x = torch.tensor(far).to(dtype)[:, None].expand(-1, D).contiguous().requires_grad_()
    y = ops.bias_gelu(x, None)
    (dx,) = torch.autograd.grad(y.sum(), x)
    slope = torch.tensor([1.0, 0, 1, 0, 1, 0, 0.5, 0.5]).to(dtype)[:, None].expand(-1, D)
    assert_equal((y, dx), (x.detach().clamp(min=0), slope))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1, -0x400000], ids=hex)
def test_nan_stays(isa, bits):
    x = torch.tensor([bits] * 40, dtype=torch.int32).view(F32).requires_grad_()
    y = ops.bias_gelu(x, None)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().all()
    assert dx.isnan().all()


def test_the_sum_is_not_rounded(isa):
    """1 + 2^-9 is no bf16 value."""
    x, bias = torch.ones(3, 5).bfloat16(), torch.full((5,), 2.0**-9)
    assert torch.equal(ops.bias_gelu(x * 512, bias), x * 512)
    exact = torch.nn.functional.gelu(torch.tensor(-1 + 2.0**-9, dtype=F64)).expand(3, 5)
    assert_close_to_float64("y", ops.bias_gelu(-x, bias).float(), exact.bfloat16(), exact)
    assert not torch.equal(ops.bias_gelu(-x, bias), ops.bias_gelu(-x))


@pytest.mark.parametrize("dtypes", GELU_DTYPES.values(), ids=GELU_DTYPES)
@pytest.mark.parametrize("D", [1, 63, 512])
def test_backward_gives_the_forward_output_again_bit_for_bit(isa, D, dtypes):
    inputs = {name: t.detach() for name, t in make(70, D, dtypes=dtypes).items()}
    dy, bias = torch.randn(70, D).to(dtypes[0]), inputs.get("bias")
    y = torch.ops.maefast.bias_gelu_fwd(inputs["x"], bias)
    dx, dbias, none = torch.ops.maefast.bias_gelu_bwd(dy, inputs["x"], bias, False)
    assert_equal(torch.ops.maefast.bias_gelu_bwd(dy, inputs["x"], bias, True), (dx, dbias, y))
    assert none.shape == (0,)
    assert dbias.shape == (0 if bias is None else D,)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rows", [1, 70, 700])
def test_backward_sums_the_columns_of_dx_without_a_bias(isa, rows, dtype):
    """The gradient of the bias that x holds already."""
    x, dy = torch.randn(rows, 63).to(dtype), torch.randn(rows, 63).to(dtype)
    dx, total, _ = torch.ops.maefast.bias_gelu_bwd(dy, x, None, False, True)
    assert torch.equal(dx, torch.ops.maefast.bias_gelu_bwd(dy, x, None, False)[0])

    def plain(wide: torch.dtype) -> Tensor:
        leaf = x.to(wide).requires_grad_()
        (grad,) = torch.autograd.grad(ops.bias_gelu_ref(leaf, None), leaf, dy.to(wide))
        return grad.sum(dim=0)

    assert total.dtype == F32
    assert_close_to_float64("dx_sum", total, plain(dtype).to(F32), plain(F64))


@pytest.mark.huge
def test_backward_of_more_than_2_31_elements(native):
    """At zero the slope is one half."""
    rows, D = 2**18 + 3, 8192
    x, dy = torch.zeros(1, D).bfloat16(), torch.randint(-8, 8, (1, D)).bfloat16()
    dx, dbias, _ = torch.ops.maefast.bias_gelu_bwd(dy.expand(rows, D), x.expand(rows, D), torch.zeros(D), False)
    assert dx.numel() > 2**31
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(dx[row], dy[0] / 2)
    assert torch.equal(dbias, dy[0].float() / 2 * rows)  # multiples of one half below 2^23
