import math

import pytest
import torch
from support import assert_equal
from tritonrun import DEVICE, F16, F32, FLOATS, check, random

import maefast
from maefast import ops
from maefast.testing.errors import assert_close_to_float64


def run(*shape, dtypes=(F32, F32), x=None):
    inputs = {"x": (2 * random(*shape, dtype=dtypes[0]) if x is None else x).requires_grad_()}
    return inputs if dtypes[1] is None else inputs | {"bias": random(shape[-1], dtype=dtypes[1]).requires_grad_()}


def dy(*shape):
    return random(*shape, dtype=F16)


@pytest.mark.parametrize("D", [1, 15, 63, 130, 768])
@pytest.mark.parametrize("dtype", FLOATS)
def test_widths(D, dtype):
    check(ops.bias_gelu, *(run(7, D, dtypes=(dtype, dtype)) for _ in range(8 if D < 16 else 2)), dy=dy(7, D))


@pytest.mark.parametrize("dtypes", [(F32, F16), (F16, F32), (F32, None), (F16, None)])
def test_dtypes(dtypes):
    check(ops.bias_gelu, *(run(6, 40, dtypes=dtypes) for _ in range(4)), dy=dy(6, 40))


@pytest.mark.parametrize("shape", [(20,), (1, 20), (17, 20), (2, 3, 5, 20), (90, 3)])
def test_rows(shape):
    check(ops.bias_gelu, *(run(*shape) for _ in range(3)), dy=dy(*shape))


def test_layouts():
    shape = (3, 5, 24)
    for x in (random(3, 24, 5).mT, random(3, 5, 30)[..., 3:27], random(1, 5, 24).expand(shape)):
        check(ops.bias_gelu, run(*shape, x=x), dy=dy(*shape))
    check(ops.bias_gelu, run(*shape), dy=dy(3, 24, 5).mT)
    check(ops.bias_gelu, run(*shape), dy=dy(1, 1, 1).expand(shape))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("limits", [(-14.0, 14.0), (-1.0, 1.0), (-1e-3, 1e-3), (-6.0, -4.0), (4.0, 6.0), (-0.8, -0.7)])
def test_everywhere(dtype, limits):
    """Each part of the curve is held to the rule by itself: large values would hide small ones."""
    x = torch.linspace(*limits, 6000, device=DEVICE).to(dtype).reshape(20, 300).requires_grad_()
    check(ops.bias_gelu, {"x": x})


def test_the_tail_keeps_its_digits():
    """1 + erf loses them: at -6 half the digits of fp32, and at -8 nothing is left."""
    x = torch.linspace(-13.0, -3.0, 1000, device=DEVICE).requires_grad_()
    with maefast.backend("triton"):
        y = ops.bias_gelu(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double()
    cdf, density = torch.special.erfc(-wide / 2**0.5) / 2, torch.exp(-(wide**2) / 2) / (2 * math.pi) ** 0.5
    assert ((y.double() / (wide * cdf) - 1).abs() < 2e-5).all()
    assert ((dx.double() / (cdf + wide * density) - 1).abs() < 2e-5).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_limits(dtype):
    x = torch.tensor([math.inf, -math.inf, 60_000.0, -60_000.0, 0.0, math.nan], dtype=dtype, device=DEVICE).requires_grad_()
    with maefast.backend("triton"):
        y = ops.bias_gelu(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.tolist()[:-1] == [math.inf, 0, x[2].item(), 0, 0]
    assert dx.tolist()[:-1] == [1, 0, 1, 0, 0.5]
    assert torch.stack([y[-1], dx[-1]]).isnan().all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_again_in_backward(bias):
    x, shift = run(5, 70, dtypes=(F16, F32)).values()
    x, shift = x.detach(), shift.detach() if bias else None
    dx, dbias, y = torch.ops.maefast_triton.bias_gelu_bwd(dy(5, 70), x, shift, True)
    assert_equal(y, torch.ops.maefast_triton.bias_gelu_fwd(x, shift))
    assert (dx.shape, dbias.shape, dbias.dtype) == ((5, 70), (70 if bias else 0,), F32)


def test_column_sum_without_a_bias():
    """What the bias before x would get where x holds it already."""
    x = random(41, 70)
    dx, total, _ = torch.ops.maefast_triton.bias_gelu_bwd(dy(41, 70), x, None, False, True)
    wide = torch.ops.maefast_triton.bias_gelu_bwd(dy(41, 70), x, torch.zeros(70, device=DEVICE), False)[1]
    assert total.shape == wide.shape == (70,)
    assert_close_to_float64("dx_sum", total, dx.sum(dim=0), dx.double().sum(dim=0))


def test_empty():
    inputs = run(0, 4, 8)
    with maefast.backend("triton"):
        y = ops.bias_gelu(**inputs)
        grads = torch.autograd.grad(y, tuple(inputs.values()), torch.empty_like(y))
    assert_equal((y, *grads), (inputs["x"], inputs["x"], torch.zeros(8, device=DEVICE)))
