"""Resizing of positions from one grid of patches to another."""

import torch.nn.functional as F
from torch import Tensor


def resize_positions(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize positions (1, L, D) of `grid` (rows, columns) to `new_grid` in 2-D, bicubic."""
    if new_grid == grid:
        return positions
    table = positions.unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    table = F.interpolate(table, new_grid, mode="bicubic", align_corners=False)
    return table.flatten(2).transpose(1, 2)
