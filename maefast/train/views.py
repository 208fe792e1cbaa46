"""Batches of images for what has labels: read by threads, ahead of their use."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .boxes import Size, View

if TYPE_CHECKING:
    from .dataset import ImageDataset

AHEAD = 2  # batches
TASK = 32  # images that a thread reads at a time


def read_batches(
    images: "ImageDataset | Any", batches: Sequence[Tensor], size: Size, view: View | Callable[[int], View]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (n, C, *size) uint8 and labels (n,) int64 of each batch of indices.

    view    of all images, or of the one with an index
    Raises UserError (the data set's UnreadableImage) for a broken file: a score that leaves images out is of another data set.
    """
    waiting = deque[tuple[Tensor, list[Future[Tensor]]]]()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for ids in batches:
                waiting.append((ids, [pool.submit(_read, images, part.tolist(), size, view) for part in ids.split(TASK)]))
                if len(waiting) > AHEAD:
                    yield _collected(images, *waiting.popleft())
            while waiting:
                yield _collected(images, *waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _read(images: Any, indices: list[int], size: Size, view: View | Callable[[int], View]) -> Tensor:
    if isinstance(view, View):
        pixels: Tensor = images.read_many(indices, size, view.box)
        return pixels.flip(-1) if view.flip else pixels
    return torch.stack([_looked_at(images, index, size, view(index)) for index in indices])


def _looked_at(images: Any, index: int, size: Size, view: View) -> Tensor:
    image: Tensor = images.read(index, size, view.box)
    return image.flip(-1) if view.flip else image


def _collected(images: Any, ids: Tensor, futures: list[Future[Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([future.result() for future in futures]), images.labels[ids]
