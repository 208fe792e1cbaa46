"""Figures of a training, drawn with matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .files import replace_file
from .masks import draw_noise

GREY = 0.5  # of hidden patches


@dataclass(frozen=True)
class Panel:
    """Pictures of one model, in three rows of n."""

    title: str
    original: Tensor  # (n, C, H, W) uint8, C 1 or 3
    masked: Tensor  # the same, removed patches grey
    reconstruction: Tensor  # the same, removed patches as the model predicts them

    @property
    def rows(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("original", "masked", "reconstruction")}


@torch.no_grad()
def make_panel(title: str, model: Any, images: Tensor, mask_ratio: float, seed: int, sampler: str = "random") -> Panel:
    """Return the panel of a maefast.MAE for images (n, C, H, W), uint8 or normalised floats. One of
    SAMPLERS draws masks from `seed`. If C is not 1 or 3, the first channel is shown."""
    grid, len_keep = model.patch_embed.grid_size, ops.len_keep(model.patch_embed.num_patches, mask_ratio)
    noise = draw_noise(sampler, len(images), grid, len_keep, torch.Generator().manual_seed(seed)).to(images.device)
    shown_images, images = images, images.nan_to_num(0.0) if images.is_floating_point() else images
    mask = model(images, mask_ratio, noise=noise).mask
    ph, pw = model.patch_embed.patch_size
    hidden = mask.reshape(-1, 1, *grid).repeat_interleave(ph, dim=2).repeat_interleave(pw, dim=3) > 0
    pictures = model.reconstruct(images, mask_ratio, noise=noise)
    if images.is_floating_point():
        pictures, images = _in_grey_levels(pictures, shown_images), _in_grey_levels(shown_images, shown_images)
    masked = torch.where(hidden, torch.full_like(images, round(GREY * 255)), images)
    rows = (row[:, : 3 if images.shape[1] == 3 else 1] for row in (images, masked, pictures.round().clamp(0, 255)))
    return Panel(title, *(row.to(torch.uint8).cpu() for row in rows))


def _in_grey_levels(values: Tensor, images: Tensor) -> Tensor:
    """Scale floats to 0..255, from least to greatest value of each of `images`; NaN is white."""
    low = images.nan_to_num(torch.inf).amin(dim=(1, 2, 3), keepdim=True)
    high = images.nan_to_num(-torch.inf).amax(dim=(1, 2, 3), keepdim=True)
    levels = (values - low) / (high - low).clamp(min=1e-12) * 255
    return levels.nan_to_num(255.0, 255.0, 0.0).round().clamp(0, 255)


def as_one_picture(panel: Panel) -> Tensor:
    """Return the pictures of a panel as one of them: (C, 3 H, n W) uint8."""
    return torch.cat([torch.cat(list(row), dim=2) for row in panel.rows.values()], dim=1)


def save_reconstructions(panels: Sequence[Panel], path: Path) -> None:
    """Write a PNG of all panels, each with the rows original, masked and reconstruction."""
    from matplotlib.figure import Figure

    most = max(len(panel.original) for panel in panels)
    figure = Figure(figsize=(1.1 * most + 1.2, 3.75 * len(panels)), dpi=110, layout="constrained")
    for subfigure, panel in zip(figure.subfigures(len(panels), 1, squeeze=False).flat, panels, strict=True):
        subfigure.suptitle(panel.title, fontsize=10)
        axes = subfigure.subplots(3, len(panel.original), squeeze=False)
        for line, (name, pictures) in zip(axes, panel.rows.items(), strict=True):
            for axis, picture in zip(line, pictures, strict=True):
                axis.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(name, fontsize=9)
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png")


def save_losses(curves: Sequence[tuple[str, Sequence[int], Sequence[float]]], path: Path) -> None:
    """Write a PNG of loss against step, with one plot for each (title, steps, losses)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves), 3.4), dpi=110, layout="constrained")
    for axis, (title, steps, losses) in zip(figure.subplots(1, len(curves), squeeze=False).flat, curves, strict=True):
        axis.plot(steps, losses, linewidth=1.2)
        axis.set(title=title, xlabel="step", ylabel="mean squared error of the removed patches")
        axis.grid(alpha=0.3)
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png")
