"""Images of floating-point values, in the unit of their mean and std; NaN is a missing value."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .crops import BoxOf, Size
from .sources import ImageDataset


class NormalisedImages(ImageDataset):
    """The images of a float data set as (x - mean)/std, fp32.

    mean, std   (C,)
    fill        whether a missing value is read as the mean instead of NaN
    """

    def __init__(self, images: Any, mean: Tensor, std: Tensor, fill: bool):
        super().__init__(images.labels, images.classes, images.channels)
        self.images, self.fill, self.dtype = images, fill, images.dtype
        self.source, self.left_out = images.source, images.left_out
        self.mean, self.std = (values.detach().cpu()[:, None, None] for values in (mean, std))

    def read_many(self, indices: Sequence[int], size: Size, box: BoxOf) -> Tensor:
        return self._normalised(self.images.read_many(indices, size, box))

    def _read(self, index: int, size: Size | None, box: BoxOf | None) -> Tensor:
        return self._normalised(self.images.read(index, size, box))

    def _normalised(self, pixels: Tensor) -> Tensor:
        pixels = (pixels - self.mean) / self.std
        return pixels.nan_to_num(0.0) if self.fill else pixels


def in_unit_of(model: Any, images: Any, nodata: float | None, *, fill: bool) -> Any:
    """Return the images as `model` takes them: uint8 unchanged, floats normalised.

    nodata      the value of floats that marks a missing value
    Raises UserError if the model's mean and std cannot belong to such images.
    """
    if images.dtype == torch.uint8:
        if nodata is not None:
            raise UserError(f"--nodata must be given only for float arrays; the images are uint8, and it is {nodata:g}")
        for name in ("mean", "std"):
            values = getattr(model, name)
            if values is not None and not ((values >= 0) & (values <= 1)).all():
                told = ", ".join(f"{value:g}" for value in values.tolist())
                raise UserError(f"--{name} must lie in 0..1 for uint8 images; it is {told}")
        return images
    if not model.statistics_given:
        raise UserError("--mean and --std must be given for float images, in their own unit: the checkpoint does not store them")
    if nodata is not None:
        images.nodata = nodata
    return NormalisedImages(images, model.mean, model.std, fill)


def fill_missing(images: Tensor, patch_size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Return images (N, C, H, W) with 0, the mean, for each NaN, and weights (N, L): 0 for a patch
    with a missing value, else 1. The weights are None if no value is missing."""
    missing = images.isnan() if images.dtype.is_floating_point else None
    if missing is None or not missing.any():
        return images, None
    holes = F.max_pool2d(missing.any(dim=1, keepdim=True).float(), patch_size)
    return images.nan_to_num(0.0), 1 - holes.flatten(1)
