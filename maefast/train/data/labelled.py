"""Labelled images: two splits of a data set, read in batches by threads, ahead of their use."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .crops import TRAINING_AREA, Size, View, drawn
from .open import open_images, open_part
from .order import draw_of
from .splits import stratified_split

Pairs = Iterator[tuple[Tensor, Tensor]]  # inputs and labels, or features and labels, of each batch
Batches = Callable[[int, Sequence[Tensor]], Pairs]  # of an epoch and the indices of each batch

AHEAD = 2  # batches
TASK = 32  # images that a thread reads at a time


def read_batches(images: Any, batches: Sequence[Tensor], size: Size, view: View | Callable[[int], View]) -> Pairs:
    """Yield images (n, C, *size) uint8 and labels (n,) int64 of each batch of indices.

    view    the view of all images, or a function from the index of an image to its view
    Raises UnreadableImage for a broken file: a score without it would be that of another data set.
    """
    waiting = deque[tuple[Tensor, list[Future[Tensor]]]]()

    def next_batch() -> tuple[Tensor, Tensor]:
        ids, futures = waiting.popleft()
        return torch.cat([future.result() for future in futures]), images.labels[ids]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for ids in batches:
                waiting.append((ids, [pool.submit(_read, images, part.tolist(), size, view) for part in ids.split(TASK)]))
                if len(waiting) > AHEAD:
                    yield next_batch()
            while waiting:
                yield next_batch()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(images: Any, indices: list[int], size: Size, view: View | Callable[[int], View]) -> Tensor:
    if isinstance(view, View):
        return view.flipped(images.read_many(indices, size, view.box))
    views = [view(index) for index in indices]
    return torch.stack([its.flipped(images.read(index, size, its.box)) for index, its in zip(indices, views, strict=True)])


@dataclass(frozen=True)
class Labelled:
    """A labelled data set of two splits, and the view of its images.

    data        a folder with both splits, or the images to learn from if val_path is given
    val_path    the images to score: the eval_split of a folder with splits, otherwise all of them
    exclude     the output of a run, which is left out of the images
    """

    data: Path
    train_split: str = "train"
    eval_split: str = "val"
    label_fraction: float = 1.0  # of each class of train_split, drawn by the seed
    crop_pct: float | None = None  # of the largest centred box, per side; None: crops.usual_scale
    augment: str = "none"
    val_path: Path | None = None
    exclude: Path | None = None

    def opened(self, channels: int, seed: int) -> tuple[Any, Tensor, Any]:
        """Return the images to learn from, their indices to use, and the images to score. Raises
        UserError for images without labels, or with other classes in either data set."""
        whole = Path(self.data).is_file()
        train = open_images(self.data, None if whole else self.train_split, channels, self.exclude)
        if self.val_path is not None:
            evaluated, place = open_part(self.val_path, self.eval_split, channels, self.exclude), str(self.val_path)
        elif whole:
            raise UserError(f"--val_path must be given if DATA is one file, for the images to score; DATA is {self.data}")
        else:
            evaluated = open_images(self.data, self.eval_split, channels, self.exclude)
            place = f"the {self.eval_split} split of {self.data}"
        count = len(evaluated.classes)
        if train.classes[:count] == evaluated.classes == tuple(map(str, range(count))):  # numbers up to the greatest one
            evaluated.classes = train.classes
        for images, name in ((train, f"the {self.train_split} split of {self.data}"), (evaluated, place)):
            if len(images.classes) < 2:
                raise UserError(f"DATA must have two classes or more; {name} has {len(images.classes)}")
            if missing := int((images.labels < 0).sum()):
                raise UserError(f"DATA must have a label for every image; {missing} of {len(images)} images in {name} have none")
        if train.classes != evaluated.classes:
            parts = f"the {self.train_split} and {self.eval_split} splits of {self.data}"
            if self.val_path is not None:
                parts = f"{self.data} and {self.val_path}"
            raise UserError(f"DATA must have the same classes in both splits; {parts} have different ones")
        taken = torch.arange(len(train))
        if self.label_fraction < 1:
            _, taken = stratified_split(train.labels, self.label_fraction, seed)
            if len(train.labels[taken].unique()) < len(train.labels.unique()):
                fraction = self.label_fraction
                raise UserError(f"--label_fraction must keep an image of each class in {self.data}; {fraction:g} does not")
        return train, taken, evaluated


class Chosen:
    """A subset of a data set, by indices."""

    def __init__(self, images: Any, ids: Tensor):
        self.images, self.ids = images, ids
        self.labels, self.channels, self.classes, self.dtype = images.labels[ids], images.channels, images.classes, images.dtype

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int, *where: Any) -> Tensor:
        return self.images.read(int(self.ids[index]), *where)

    def read_many(self, indices: Sequence[int], *where: Any) -> Tensor:
        return self.images.read_many(self.ids[list(indices)].tolist(), *where)


def reading(images: Any, size: Size, view: Callable[[int], View | Callable[[int], View]]) -> Batches:
    return lambda epoch, batches: read_batches(images, batches, size, view(epoch))


def augmented(images: Chosen, size: Size, seed: int) -> Batches:
    """Read a random box of each image, mirrored half of the time, drawn again in each epoch."""

    def view(epoch: int, index: int) -> View:
        return drawn(draw_of(seed, epoch, index), size, "rrc", True, TRAINING_AREA)

    return reading(images, size, lambda epoch: partial(view, epoch))
