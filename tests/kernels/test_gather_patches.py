from functools import partial

import pytest
import torch
from tritonrun import DEVICE, F16, F32, FLOATS, U8, check, permutations, random

import maefast
from maefast import ops


def run(patch, dtype, grid=(3, 2), C=3, N=2, K=4, imgs=None, statistics=False):
    if imgs is None:
        imgs = random(N, C, grid[0] * patch[0], grid[1] * patch[1], dtype=dtype)
    inputs = {"imgs": imgs, "ids": permutations(imgs.shape[0], grid[0] * grid[1])[:, :K]}
    if statistics:
        inputs |= {"mean": random(C), "std": torch.rand(C, device=DEVICE) + 0.2}
    return inputs


@pytest.mark.parametrize("patch", [(1, 1), (7, 5), (14, 14), (16, 16)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats(patch, dtype):
    check(partial(ops.gather_patches, patch_size=patch), run(patch, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("statistics", [True, False])
def test_uint8(dtype, statistics):
    inputs, op = run((8, 16), U8, statistics=statistics), partial(ops.gather_patches, patch_size=(8, 16))
    check(partial(op, dtype=dtype), inputs, exact=partial(op, dtype=torch.float64))


def test_casts():
    op = partial(ops.gather_patches, patch_size=(4, 2))
    for dtype, out in ((F32, F16), (F16, F32)):
        check(partial(op, dtype=out), run((4, 2), dtype), exact=partial(op, dtype=torch.float64))


@pytest.mark.parametrize("C", [1, 4, 13])
def test_channels(C):
    check(partial(ops.gather_patches, patch_size=(3, 8)), run((3, 8), F32, C=C))


def test_layouts():
    shape = (2, 3, 12, 12)
    misaligned, crop = random(2 * 3 * 12 * 12 + 1)[1:].reshape(shape), random(2, 5, 15, 17)[:, 1:4, 2:14, 3:15]
    channels_last = random(*shape).contiguous(memory_format=torch.channels_last)
    for imgs in (channels_last, misaligned, crop, random(*shape).mT, random(1, 1, 12, 12).expand(shape)):
        check(partial(ops.gather_patches, patch_size=(4, 6)), run((4, 6), F32, imgs=imgs))


def test_empty_and_out_of_range():
    for N, K in ((0, 3), (2, 0)):
        assert run((2, 2), F32, N=N, K=K)["ids"].shape == (N, K)
        check(partial(ops.gather_patches, patch_size=2), run((2, 2), F32, N=N, K=K))
    imgs, ids = random(1, 1, 4, 4), torch.tensor([[3, -1, 4, 2**40, 0]], device=DEVICE)
    with maefast.backend("triton"):
        got = ops.gather_patches(imgs, ids, 2)
    expected = ops.gather_patches_ref(imgs, torch.tensor([[3, 0]], device=DEVICE), (2, 2), None, None, F32)
    assert torch.equal(got[:, [0, 4]], expected)
    assert not got[:, 1:4].any()
