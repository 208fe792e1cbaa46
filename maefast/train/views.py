"""The part of an image that a model sees, and batches of such parts."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the stored image
AREA, PROPORTIONS = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random box: of the image's area, and width to height


class View(NamedTuple):
    """How one image is looked at: the box of it, given (height, width), and whether it is mirrored."""

    box: Callable[[int, int], Box]
    flip: bool = False


def centred(size: tuple[int, int], part: float = 1.0) -> View:
    """The largest centred box of the proportions of `size` (H, W), its sides scaled by `part`."""

    def box(height: int, width: int) -> Box:
        scale = part * min(height / size[0], width / size[1])
        h, w = scale * size[0], scale * size[1]
        return _within(height, width, (width - w) / 2, (height - h) / 2, w, h)

    return View(box)


def random_resized(size: tuple[int, int], draws: Tensor) -> View:
    """A box of random area and proportions, mirrored half of the time: a random resized crop and a flip.

    size     (H, W) that the box is resized to; proportions are drawn about those of `size`
    draws    (5,) uniform in [0, 1): of area, proportions (on a logarithmic scale), column, row and flip
    A box that is wider or higher than the image is cut to it.
    """
    area, proportion, column, row, flip = draws.tolist()

    def box(height: int, width: int) -> Box:
        pixels = height * width * (AREA[0] + area * (AREA[1] - AREA[0]))
        low, high = (math.log(value * size[1] / size[0]) for value in PROPORTIONS)
        aspect = math.exp(low + proportion * (high - low))
        w, h = min(width, math.sqrt(pixels * aspect)), min(height, math.sqrt(pixels / aspect))
        return _within(height, width, column * (width - w), row * (height - h), w, h)

    return View(box, flip < 0.5)


def _within(height: int, width: int, left: float, top: float, w: float, h: float) -> Box:
    """A box of w x h at (left, top); rounding may have put it beyond the edge of the image."""
    return max(0.0, left), max(0.0, top), min(float(width), left + w), min(float(height), top + h)


def read_batches(
    images: Any, batches: Sequence[Tensor], size: tuple[int, int], view: Callable[[], View]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (n, C, *size) uint8 and labels (n,) int64 of each batch of indices, read by threads, two batches ahead.

    images    an ImageDataset
    view      called once for each image, in order, in the caller's thread
    Raises UserError (the data set's UnreadableImage) for a broken file: a score that leaves images out is of another data set.
    """
    waiting = deque[tuple[Tensor, list[Future[Tensor]]]]()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for ids in batches:
                waiting.append((ids, [pool.submit(_read, images, i, size, view()) for i in ids.tolist()]))
                if len(waiting) > 2:
                    yield _collected(images, *waiting.popleft())
            while waiting:
                yield _collected(images, *waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _read(images: Any, index: int, size: tuple[int, int], view: View) -> Tensor:
    image: Tensor = images.read(index, size, view.box)
    return image.flip(-1) if view.flip else image


def _collected(images: Any, ids: Tensor, futures: list[Future[Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([future.result() for future in futures]), images.labels[ids]
