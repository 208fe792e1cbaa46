"""Sizes, positions and initial weights of a model."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class MAEOutput(NamedTuple):
    """The output of a Masked Autoencoder's forward; unpacks like the official triple."""

    loss: Tensor  # () fp32
    pred: Tensor | None  # (N, L, P), channel-fastest patch order (ph, pw, C)
    mask: Tensor  # (N, L) fp32, 1 = removed


def pair(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """Return `size` as (height, width); an int stands for both."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be positive; it is {size}")
    return int(height), int(width)


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return fixed sin-cos positions of a grid of patches, after a zero row for the class token.

    Half of the width encodes the column and half the row, each as [sin | cos] of pos * 10000^(-k /
    (dim/4)), k = 0 .. dim/4-1 (the 2-D form of Vaswani et al. 2017, section 3.5). Computed in
    float64, returned as (1, 1+L, dim) fp32.
    """
    if dim % 4:
        raise ValueError(f"the width of sin-cos positions must be divisible by 4, it is {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    col_angle, row_angle = (axis.reshape(-1, 1) * omega for axis in (cols, rows))  # [L, dim/4]
    table = torch.cat([col_angle.sin(), col_angle.cos(), row_angle.sin(), row_angle.cos()], dim=1)
    return torch.cat([table.new_zeros(1, dim), table]).float().unsqueeze(0)


@torch.no_grad()
def init_weights(model: Any) -> None:
    """Initialise a model just built, in the official order of random numbers: one seed gives the
    official weights. The bias of the patch embedding keeps torch's default draw."""
    model.pos_embed.copy_(sincos_positions(model.pos_embed.shape[-1], model.patch_embed.grid_size))
    model.decoder_pos_embed.copy_(sincos_positions(model.decoder_pos_embed.shape[-1], model.patch_embed.grid_size))
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))
    nn.init.normal_(model.cls_token, std=0.02)
    nn.init.normal_(model.mask_token, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
