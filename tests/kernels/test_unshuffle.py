from itertools import product

import pytest
import torch
from support import assert_equal
from tritonrun import DEVICE, F16, F32, FLOATS, check, permutations, random

import maefast
from maefast import ops


def run(D, dtypes=(F32, F32, F32), N=2, L=9, K=3):
    return {
        "x": random(N, 1 + K, D, dtype=dtypes[0]).requires_grad_(),
        "ids_restore": permutations(N, L),
        "mask_token": random(1, 1, D, dtype=dtypes[1]).requires_grad_(),
        "pos_embed": random(1, 1 + L, D, dtype=dtypes[2]).requires_grad_(),
    }


@pytest.mark.parametrize("D", [1, 24, 63, 192, 768])
@pytest.mark.parametrize("dtype", FLOATS)
def test_widths(D, dtype):
    check(ops.unshuffle, *(run(D, (dtype,) * 3) for _ in range(8 if D == 1 else 1)), dy=random(2, 10, D))


@pytest.mark.parametrize("dtypes", list(product(FLOATS[:2], repeat=3)))
def test_mixed_dtypes(dtypes):
    check(ops.unshuffle, run(40, dtypes), dy=random(2, 10, 40))


@pytest.mark.parametrize(("N", "L", "K"), [(1, 1, 0), (1, 1, 1), (19, 5, 1), (3, 7, 7), (3, 7, 0), (9, 33, 8)])
def test_sizes(N, L, K):
    check(ops.unshuffle, run(20, N=N, L=L, K=K), dy=random(N, 1 + L, 20))


def test_layouts():
    inputs = run(24) | {"ids_restore": random(9, 2).argsort(dim=0).T}
    check(ops.unshuffle, inputs, dy=random(1, 1, 1).expand(2, 10, 24))
    check(ops.unshuffle, inputs | {"x": random(2, 24, 4).mT.requires_grad_()}, dy=random(2, 24, 10).mT)
    check(ops.unshuffle, inputs | {"x": random(2, 9, 24)[:, 2:6].requires_grad_()}, dy=random(2, 12, 24)[:, 1:11])


def test_empty():
    inputs = run(8, N=0)
    with maefast.backend("triton"):
        y = ops.unshuffle(**inputs)
        grads = torch.autograd.grad(y, (inputs["x"], inputs["mask_token"]), torch.empty_like(y))
    assert y.shape == (0, 10, 8)
    assert_equal(grads, (inputs["x"], torch.zeros_like(inputs["mask_token"])))


def test_ranks_out_of_range_are_mask_tokens():
    inputs = run(8, (F16, F16, F16), N=1, L=4, K=2)
    bad, good = torch.tensor([[[0, -1, 2**40, 1]], [[0, 2, 3, 1]]], device=DEVICE)
    with maefast.backend("triton"):
        assert_equal(ops.unshuffle(**inputs | {"ids_restore": bad}), ops.unshuffle(**inputs | {"ids_restore": good}))
