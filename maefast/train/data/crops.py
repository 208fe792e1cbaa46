"""Crops of images. A random box depends only on the seed, the epoch and the image's index."""

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the stored image
BoxOf = Callable[[int, int], Box]  # of (height, width)
Size = tuple[int, int]  # height, width

FIXED_CROP = 7 / 8  # of the sides of the largest fitting box, as 224 of 256 pixels
PRETRAINING_AREA, TRAINING_AREA = 0.2, 0.08  # the least of a random crop, without labels (appendix A.1) and with them
ASPECT = 3 / 4, 4 / 3
TRIES = 10  # to draw a random resized crop that fits


class View(NamedTuple):
    """The box of an image to read, and whether to mirror it."""

    box: BoxOf
    flip: bool = False

    def flipped(self, pixels: Tensor) -> Tensor:
        return pixels.flip(-1) if self.flip else pixels


def centred(height: int, width: int, size: Size, scale: float = 1.0) -> Box:
    """Return the largest centred box with the aspect of `size`, its sides times `scale`."""
    rows, cols = size
    side = min(height / rows, width / cols) * scale
    top, left = (height - side * rows) / 2, (width - side * cols) / 2
    return _within(height, width, (left, top, left + side * cols, top + side * rows))


def centre_square(height: int, width: int) -> Box:
    return centred(height, width, (1, 1))


def fixed_crop(height: int, width: int, size: Size, draw: random.Random) -> Box:
    """Return a box of a fixed size at a random place."""
    left, top, right, bottom = centred(height, width, size, FIXED_CROP)
    dx, dy = draw.uniform(-left, left), draw.uniform(-top, top)
    return _within(height, width, (left + dx, top + dy, right + dx, bottom + dy))


def resized_crop(height: int, width: int, size: Size, draw: random.Random, least_area: float = PRETRAINING_AREA) -> Box:
    """Return a box of random area, aspect and place, or the largest centred box if none fits."""
    for _ in range(TRIES):
        area = height * width * draw.uniform(least_area, 1.0)
        aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** draw.random() * size[1] / size[0]
        rows, cols = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if 0 < rows <= height and 0 < cols <= width:
            top, left = draw.randint(0, height - rows), draw.randint(0, width - cols)
            return left, top, left + cols, top + rows
    return centred(height, width, size)


def _within(height: int, width: int, box: Box) -> Box:
    """Cut off what rounding has put beyond the edges."""
    left, top, right, bottom = box
    return max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)


def still(size: Size, scale: float | None = None) -> View:
    """View the same centred box of every image; `scale` as in `centred` (None: usual_scale)."""
    return View(partial(centred, size=size, scale=usual_scale(size) if scale is None else scale))


def usual_scale(size: Size) -> float:
    """Return evaluation's `scale`: 7/8 from 224 pixels on, as in the official code, and 1 below."""
    return FIXED_CROP if min(size) >= 224 else 1.0


def drawn(draw: random.Random, size: Size, augment: str, flip: bool, least_area: float = PRETRAINING_AREA) -> View:
    """Draw a view. `flip` mirrors half of the images.

    augment    "none" (the largest centred box), "crop" (fixed size), else random size and aspect
    """
    mirrored = flip and draw.random() < 0.5
    if augment == "none":
        return View(partial(centred, size=size), mirrored)
    if augment == "crop":
        return View(partial(fixed_crop, size=size, draw=draw), mirrored)
    return View(partial(resized_crop, size=size, draw=draw, least_area=least_area), mirrored)
