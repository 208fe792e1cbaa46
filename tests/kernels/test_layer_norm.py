from functools import partial

import pytest
import torch
from tritonrun import DEVICE, F16, F32, FLOATS, check, random

import maefast
from maefast import ops
from maefast.testing.errors import assert_close_to_float64

EPS = 1e-5


def run(*shape, dtypes=(F32, F32), x=None):
    """dtypes are those of x and of weight and bias."""
    x = random(*shape, dtype=dtypes[0]) if x is None else x
    D = x.shape[-1]
    parameters = {name: random(D, dtype=dtypes[1]).requires_grad_() for name in ("weight", "bias")}
    return {"x": x.requires_grad_(), **parameters}


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
    """Nothing is left of them but the bias."""
    x, weight, bias = run(5, 1).values()
    with maefast.backend("triton"):
        y = ops.layer_norm(x, weight, bias)
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert torch.equal(y, bias.expand(5, 1))
    assert not dx.any()
    assert not dweight.any()
    assert dbias.item() == 5


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
    inputs = run(*shape) | {"weight": random(48)[::2].requires_grad_()}
    check(op(), inputs, dy=dy(*shape))


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
        dx, dweight, dbias = torch.autograd.grad(y, tuple(inputs.values()), torch.empty_like(y))
    assert y.shape == dx.shape == (0, 4, 8)
    assert torch.equal(dweight, torch.zeros(8, device=DEVICE))
    assert torch.equal(dbias, torch.zeros(8, device=DEVICE))


def backward(x, weight, bias, dy, dresidual, y_dtype, cast_dtype, with_dx_sum=False):
    mean, var = x.float().mean(dim=-1).flatten(), x.float().var(dim=-1, correction=0).flatten()
    args = (dy, dresidual, x, weight, bias, mean, (var + EPS).rsqrt(), y_dtype, cast_dtype, with_dx_sum)
    return torch.ops.maefast_triton.layer_norm_bwd(*args)


@pytest.mark.parametrize("x_dtype", [F32, F16])
@pytest.mark.parametrize("cast", [None, F16, F32])
def test_backward_with_residual_cast_and_output(x_dtype, cast):
    """What a block asks of one pass: the residual's gradient added, dx in a second dtype, the output again."""
    x, weight, bias = (t.detach() for t in run(3, 9, 50, dtypes=(x_dtype, F32)).values())
    dout, dresidual = dy(3, 9, 50), random(3, 9, 50)
    dx, dweight, dbias, y, dx_cast, dx_sum = backward(x, weight, bias, dout, dresidual, F16, cast, with_dx_sum=True)

    def plain(wide, y_dtype):
        leaves = [t.to(wide).requires_grad_() for t in (x, weight, bias)]
        out = ops.layer_norm_ref(*leaves, EPS, wide)
        grads = torch.autograd.grad(out, leaves, dout.to(wide))
        dx = grads[0] + dresidual
        return dx, *grads[1:], out.detach().to(y_dtype), dx.sum(dim=(0, 1))

    exact, eager, names = plain(torch.float64, torch.float64), plain(F32, F16), ("dx", "dweight", "dbias", "y", "dx_sum")
    for name, got, mine, truth in zip(names, (dx, dweight, dbias, y, dx_sum), eager, exact, strict=True):
        assert_close_to_float64(name, got, mine.to(got.dtype), truth)
    assert (dx.dtype, y.dtype, dx_sum.dtype) == (x_dtype, F16, F32)
    if cast is None:
        assert dx_cast.shape == (0,)
    else:
        assert dx_cast.dtype == cast
        assert_close_to_float64("dx_cast", dx_cast, eager[0].to(cast), exact[0])
    without = backward(x, weight, bias, dout, None, None, None)
    assert without[3].shape == without[4].shape == without[5].shape == (0,)
    assert torch.equal(without[1], dweight)


def test_wide_rows_are_left_to_others():
    x, weight = random(1, 8193), random(8193)
    with maefast.backend("triton"):
        with pytest.raises(RuntimeError, match="layer_norm takes rows of up to 8192 values, x has 8193"):
            ops.layer_norm(x, weight, weight)
        with pytest.raises(RuntimeError, match="add_layer_norm takes rows of up to 8192 values, x has 8193"):
            ops.add_layer_norm(x, x, weight, weight)
        assert ops.bias_gelu(x).shape == x.shape
