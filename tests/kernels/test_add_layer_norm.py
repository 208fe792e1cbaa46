from functools import partial

import pytest
import torch
from support import assert_equal
from tritonrun import DEVICE, F16, F32, FLOATS, check, random

import maefast
from maefast import ops


def run(*shape, dtypes=(F32, F32), x=None, residual=None):
    x = random(*shape, dtype=dtypes[0]) if x is None else x
    residual = random(*shape, dtype=dtypes[1]) if residual is None else residual
    inputs = {"x": x, "residual": residual, "weight": random(shape[-1]), "bias": random(shape[-1])}
    return {name: t.requires_grad_() for name, t in inputs.items()}


def op(dtype=None):
    return partial(ops.add_layer_norm, eps=1e-6, dtype=dtype)


def dys(*shape):
    return random(*shape, dtype=F16), random(*shape, dtype=F16)


@pytest.mark.parametrize("D", [2, 63, 768])
@pytest.mark.parametrize("dtype", FLOATS)
def test_widths(D, dtype):
    check(op(), *(run(5, D, dtypes=(dtype, dtype)) for _ in range(8 if D < 16 else 2)), dy=dys(5, D))


@pytest.mark.parametrize("dtypes", [(F16, F32), (F32, F16)])
@pytest.mark.parametrize("out", [None, F16])
def test_mixed_dtypes(dtypes, out):
    """The sum is fp32; its gradient is cast to the other input's dtype in the same pass."""
    check(op(out), *(run(3, 5, 40, dtypes=dtypes) for _ in range(2)), dy=dys(3, 5, 40), exact=op(out and torch.float64))


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_outputs_is_not_used(which):
    dy = tuple(grad if i == which else None for i, grad in enumerate(dys(4, 20)))
    check(op(), run(4, 20), run(4, 20), dy=dy)


def test_statistics_are_those_of_the_sum_as_stored():
    inputs = run(9, 30, dtypes=(F16, F16))
    with maefast.backend("triton"):
        y, total = ops.add_layer_norm(**inputs, dtype=F32)
        expected = ops.layer_norm(total, inputs["weight"], inputs["bias"], dtype=F32)
    assert_equal((y, total), (expected, inputs["x"] + inputs["residual"]))


def test_layouts():
    shape = (3, 5, 24)
    for x in (random(3, 24, 5).mT, random(3, 5, 30)[..., 3:27], random(1, 5, 24).expand(shape)):
        check(op(), run(*shape, x=x), dy=dys(*shape))
        check(op(), run(*shape, residual=x.detach()), dy=dys(*shape))


def test_empty():
    inputs = run(0, 4, 8)
    with maefast.backend("triton"):
        y, total = ops.add_layer_norm(**inputs)
        grads = torch.autograd.grad((y, total), tuple(inputs.values()), (torch.empty_like(y), torch.empty_like(total)))
    assert y.shape == total.shape == (0, 4, 8)
    assert_equal(grads[2], torch.zeros(8, device=DEVICE))
