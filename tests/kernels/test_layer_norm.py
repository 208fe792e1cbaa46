from functools import partial

import pytest
import torch
from support import assert_equal
from tritonrun import DEVICE, F16, F32, FLOATS, check, random

import maefast
from maefast import ops
from maefast.testing.errors import assert_close_to_float64

EPS = 1e-5


def run(*shape, dtypes=(F32, F32), x=None):
    x = random(*shape, dtype=dtypes[0]) if x is None else x
    weight, bias = (random(x.shape[-1], dtype=dtypes[1]) for _ in range(2))
    return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


def op(dtype=None, eps=EPS):
    return partial(ops.layer_norm, eps=eps, dtype=dtype)


def dy(*shape):
    """Gradients that fp16 holds exactly, so that their rounding hides nothing."""
    return random(*shape, dtype=F16)


@pytest.mark.parametrize("D", [2, 63, 768])
@pytest.mark.parametrize("dtype", FLOATS)
def test_widths(D, dtype):
    check(op(), *(run(5, D, dtypes=(dtype, dtype)) for _ in range(8 if D < 16 else 2)), dy=dy(5, D))


def test_rows_of_one_value():
    x, weight, bias = run(5, 1).values()
    with maefast.backend("triton"):
        y = ops.layer_norm(x, weight, bias)
        grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert_equal((y, *grads), (bias.expand(5, 1), 0 * x, 0 * weight, torch.full_like(bias, 5)))


@pytest.mark.parametrize("dtypes", [(F32, F16), (F16, F32)])
@pytest.mark.parametrize("out", [F32, F16])
def test_mixed_dtypes(dtypes, out):
    check(op(out), *(run(6, 40, dtypes=dtypes) for _ in range(2)), dy=dy(6, 40), exact=op(torch.float64))


@pytest.mark.parametrize("shape", [(20,), (1, 20), (17, 20), (2, 3, 5, 20), (90, 5)])
def test_rows(shape):
    check(op(), *(run(*shape) for _ in range(3)), dy=dy(*shape))


def test_layouts():
    shape = (3, 5, 24)
    for x in (random(3, 24, 5).mT, random(3, 5, 30)[..., 3:27], random(5, 24).expand(shape), random(1, 5, 24).expand(shape)):
        check(op(), run(x=x), dy=dy(*shape))
    check(op(), run(*shape), dy=dy(3, 24, 5).mT)
    check(op(), run(*shape), dy=dy(1, 1, 1).expand(shape))
    check(op(), run(*shape) | {"weight": random(48)[::2].requires_grad_()}, dy=dy(*shape))


@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_a_mean_far_larger_than_the_spread(offset):
    check(op(), *(run(x=random(5, 70) + offset) for _ in range(3)), dy=dy(5, 70))


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1])
def test_constant_rows_give_the_bias(value):
    inputs = run(x=torch.full((3, 100), value, device=DEVICE))
    with maefast.backend("triton"):
        y = ops.layer_norm(**inputs, eps=1e-6)
    torch.testing.assert_close(y, inputs["bias"].expand(3, 100), rtol=0, atol=1e-5)


def test_empty():
    inputs = run(0, 4, 8)
    with maefast.backend("triton"):
        y = ops.layer_norm(**inputs)
        grads = torch.autograd.grad(y, tuple(inputs.values()), torch.empty_like(y))
    assert_equal((y, *grads), (inputs["x"], inputs["x"], *torch.zeros(2, 8, device=DEVICE)))


def backward(x, weight, bias, dy, dresidual, y_dtype, cast_dtype, with_dx_sum=False):
    mean, var = x.float().mean(dim=-1).flatten(), x.float().var(dim=-1, correction=0).flatten()
    args = (dy, dresidual, x, weight, bias, mean, (var + EPS).rsqrt(), y_dtype, cast_dtype, with_dx_sum)
    return torch.ops.maefast_triton.layer_norm_bwd(*args)


@pytest.mark.parametrize("x_dtype", [F32, F16])
@pytest.mark.parametrize("cast", [None, F16, F32])
def test_backward_with_residual_cast_and_output(x_dtype, cast):
    """One pass adds the residual's gradient, gives dx in a second dtype and the output again."""
    x, weight, bias = (t.detach() for t in run(3, 9, 50, dtypes=(x_dtype, F32)).values())
    dout, dresidual = dy(3, 9, 50), random(3, 9, 50)
    dx, dweight, dbias, y, dx_cast, dx_sum = backward(x, weight, bias, dout, dresidual, F16, cast, with_dx_sum=True)

    def plain(wide, y_dtype):
        leaves = [t.to(wide).requires_grad_() for t in (x, weight, bias)]
        out = ops.layer_norm_ref(*leaves, EPS, wide)
        dx, *grads = torch.autograd.grad(out, leaves, dout.to(wide))
        dx = dx + dresidual
        return dx, *grads, out.detach().to(y_dtype), dx.sum(dim=(0, 1))

    exact, eager, names = plain(torch.float64, torch.float64), plain(F32, F16), ("dx", "dweight", "dbias", "y", "dx_sum")
    for name, got, mine, truth in zip(names, (dx, dweight, dbias, y, dx_sum), eager, exact, strict=True):
        assert_close_to_float64(name, got, mine.to(got.dtype), truth)
    assert (dx.dtype, y.dtype, dx_sum.dtype) == (x_dtype, F16, F32)
    if cast is None:
        assert dx_cast.shape == (0,)
    else:
        assert dx_cast.dtype == cast
        assert_close_to_float64("dx_cast", dx_cast, eager[0].to(cast), exact[0])
    _, again, _, *without = backward(x, weight, bias, dout, None, None, None)
    assert [t.shape for t in without] == [(0,)] * 3
    assert torch.equal(again, dweight)


def test_wide_rows_are_left_to_others():
    x, weight = random(1, 8193), random(8193)
    with maefast.backend("triton"):
        with pytest.raises(RuntimeError, match="layer_norm takes rows of up to 8192 values, x has 8193"):
            ops.layer_norm(x, weight, weight)
        with pytest.raises(RuntimeError, match="add_layer_norm takes rows of up to 8192 values, x has 8193"):
            ops.add_layer_norm(x, x, weight, weight)
        assert ops.bias_gelu(x).shape == x.shape
