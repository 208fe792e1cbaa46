"""Noise whose ranks remove random patches, blocks, or all but a grid (He et al. 2022, figure 6)."""

import math

import torch
from torch import Tensor

SAMPLERS = ("random", "block", "grid")
# Blocks as in BEiT (Bao et al. 2022, algorithm 1): 16 of 196 patches or more, aspect 0.3 to 1/0.3.
LEAST_BLOCK, BLOCK_ASPECT = 16 / 196, (0.3, 1 / 0.3)
BLOCKS = 32  # drawn per image; 14 are enough for 99 % of images, with up to 90 % removed


def check_sampler(sampler: str, grid: tuple[int, int], len_keep: int) -> None:
    """Raise ValueError unless the sampler can keep `len_keep` patches of a grid (rows, columns)."""
    rows, cols = grid
    if sampler == "grid" and (rows % 2 or cols % 2):
        raise ValueError(f"sampler grid must have even numbers of rows and columns of patches; there are {rows} x {cols}")
    if sampler == "grid" and 4 * len_keep != rows * cols:
        kept = f"{len_keep} of {rows * cols}"
        raise ValueError(f"sampler grid must keep one patch of four, as with a mask ratio of 0.75; the mask ratio keeps {kept}")


def draw_noise(sampler: str, count: int, grid: tuple[int, int], len_keep: int, generator: torch.Generator) -> Tensor:
    """Draw noise (count, L) fp32 on the generator's device; MAE keeps the `len_keep` smallest.

    "random"    uniform
    "block"     random blocks of patches are removed; the last block is cut off when enough are
    "grid"      one patch of each 2 x 2 is kept, the same one in all of an image
    """
    rows, cols = grid
    if sampler == "random":
        return torch.rand(count, rows * cols, device=generator.device, generator=generator)
    if sampler == "block":
        return _blocks(count, rows, cols, rows * cols - len_keep, generator)
    kept = torch.randint(4, (count, 1, 1), device=generator.device, generator=generator)
    row, col = (torch.arange(n, device=generator.device) % 2 for n in grid)
    return (2 * row[:, None] + col != kept).float().flatten(1)


def _blocks(count: int, rows: int, cols: int, removed: int, generator: torch.Generator) -> Tensor:
    """Draw blocks of up to `removed` patches. The patches of earlier blocks have greater noise."""
    device = generator.device
    area, aspect, top, left = torch.rand(4, count, BLOCKS, 1, device=device, generator=generator)
    elsewhere = torch.rand(count, rows * cols, device=device, generator=generator)  # in [0, 1), below that of any block
    least, low, high = min(LEAST_BLOCK * rows * cols, removed), *map(math.log, BLOCK_ASPECT)
    area, aspect = least + area * (removed - least), (low + aspect * (high - low)).exp()
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, cols)
    top, left = (top * (rows - height + 1)).floor(), (left * (cols - width + 1)).floor()
    row, col = torch.arange(rows, device=device), torch.arange(cols, device=device)
    in_rows, in_cols = (row >= top) & (row < top + height), (col >= left) & (col < left + width)
    inside = (in_rows[..., None] & in_cols[..., None, :]).flatten(2)  # [count, BLOCKS, L]
    noise = (inside * torch.arange(BLOCKS, 0, -1, device=device)[:, None]).amax(dim=1)
    return torch.where(noise > 0, noise.float(), elsewhere)
