import pytest
import torch
from tritonrun import DEVICE, random

from maefast.kernels import _common


@pytest.mark.parametrize("chunks", [1, 3, 512, 1300])
@pytest.mark.parametrize(("D", "count"), [(1, 1), (40, 1), (20, 2), (5, 3), (33, 3)])
def test_sum_columns(chunks, D, count):
    """Small integers, whose sum is exact in any order."""
    partial = torch.randint(-8, 9, (chunks, count * D), device=DEVICE).float()
    poison = torch.full((count, D + 2), torch.nan, device=DEVICE)
    _common.sum_columns(partial, *(row[1:-1] for row in poison))
    assert torch.equal(poison[:, 1:-1].flatten(), partial.sum(dim=0))
    assert poison[:, [0, -1]].isnan().all(), "written outside"


def test_rows_that_are_a_view_stay_where_they_are():
    """(..., D) with dense rows at even distances is not copied; other layouts become rows too."""
    x = random(3, 5, 12)
    views = {x: True, x[..., 2:9]: True, x[1:, :, :1]: True, x[:, :, ::2]: False, x.mT: False, x[:, 1:4, 2:9]: False}
    for t, shares in views.items():
        rows = _common.as_rows(t)
        assert torch.equal(rows, t.reshape(-1, t.shape[-1]))
        assert rows.shape[1] == 1 or rows.stride(1) == 1
        assert (rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == shares
