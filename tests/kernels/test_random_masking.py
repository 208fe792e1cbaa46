import pytest
import torch
from support import assert_equal
from tritonrun import DEVICE

import maefast
from maefast import ops


def check(noise: torch.Tensor, len_keep: int) -> None:
    with maefast.backend("triton"):
        got = ops.random_masking(noise, len_keep)
    # NaN is ordered as on the CPU: argsort on CUDA looks at bits and puts -NaN first.
    assert_equal([t.cpu() for t in got], ops.random_masking_ref(noise.cpu(), len_keep))


@pytest.mark.parametrize(("N", "L", "K"), [(3, 1, 0), (1, 1, 1), (2, 31, 8), (2, 32, 32), (3, 33, 0), (1, 70, 17), (0, 5, 2)])
def test_equals_two_stable_sorts(N, L, K):
    check(torch.rand(N, L, device=DEVICE), K)


def test_ties_infinities_and_nan():
    noise = torch.rand(6, 67, device=DEVICE).mul_(8).floor_().sub_(3)  # many ties, some at zero, some negative
    noise[:, 5] = noise[:, 40] = float("nan")
    noise[1, 3], noise[1, 50] = -float("nan"), float("nan")
    noise[2, 7], noise[2, 60] = float("inf"), -float("inf")
    noise[3, ::2], noise[3, 1::2] = -0.0, 0.0
    noise[4] *= 1e-42  # subnormal
    check(noise, 20)
    with maefast.backend("triton"):
        ids_restore = ops.random_masking(noise, 20)[1]
    assert torch.equal(ids_restore.sort(dim=1).values, torch.arange(67, device=DEVICE).expand(6, 67))


def test_non_contiguous():
    check(torch.rand(37, 2, device=DEVICE).T, 9)


def test_long_rows_are_left_to_others():
    noise = torch.rand(1, 1025, device=DEVICE)
    with maefast.backend("triton"), pytest.raises(RuntimeError, match="up to 1024"):
        ops.random_masking(noise, 3)
