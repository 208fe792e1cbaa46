"""Positions: the grid that stored ones belong to, and their fit to another one."""

import math
from pathlib import Path

import torch
from torch import Tensor

from ..init import sincos_positions
from ..positions import resize_positions
from .files import CheckpointError

Grid = tuple[int, int]


def is_sincos(pos_embed: Tensor, grid: Grid) -> bool:
    """Return whether (1, 1+L, D) are the sin-cos positions of that grid, up to rounding."""
    D = pos_embed.shape[-1]
    tolerance = max(1e-4, torch.finfo(pos_embed.dtype).eps)
    with torch.device(pos_embed.device):  # whatever the default is
        return D % 4 == 0 and torch.allclose(pos_embed.float(), sincos_positions(D, grid), rtol=0, atol=tolerance)


def grid_of(pos_embed: Tensor, told: Grid | None, models: Grid | None, path: Path) -> Grid:
    """Return the grid of stored positions (1, 1+L, D): the one given, else that of sin-cos
    positions, else the model's if it has L patches, else a square."""
    L = pos_embed.shape[1] - 1
    if L < 1:
        raise CheckpointError(f"{path} must have positions of patches; the shape of pos_embed is {tuple(pos_embed.shape)}")
    if told is not None:
        if told[0] * told[1] != L:
            raise CheckpointError(f"{path} has positions of {L} patches, and not of {told[0]} x {told[1]} as is said of it")
        return told
    side = math.isqrt(L)
    square = [(side, side)] if side * side == L else []
    for grid in square + [(rows, L // rows) for rows in range(1, L + 1) if L % rows == 0]:
        if is_sincos(pos_embed, grid):
            return grid
    likely = [models] if models is not None and models[0] * models[1] == L else square
    if not likely:
        raise CheckpointError(f"stored_grid must be given as (rows, columns): {path} has positions of {L} patches, no square")
    return likely[0]


def refitted(pos_embed: Tensor, stored: Grid, grid: Grid) -> tuple[Tensor, str | None]:
    """Return positions of another grid, computed if sin-cos or else resized, and what was done."""
    if stored == grid:
        return pos_embed, None
    change = f"for {grid[0]} x {grid[1]} patches; the file has {stored[0]} x {stored[1]}"
    if is_sincos(pos_embed, stored):
        with torch.device(pos_embed.device):
            return sincos_positions(pos_embed.shape[-1], grid), f"computed as sin-cos {change}"
    resized = resize_positions(pos_embed[:, 1:].float(), stored, grid)
    return torch.cat([pos_embed[:, :1].float(), resized], dim=1), f"resized (bicubic) {change}"
