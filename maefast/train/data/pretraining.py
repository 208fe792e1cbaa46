"""Batches of images for pre-training, which depend only on the seed, the epoch and the indices."""

import random
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UnreadableImage, UserError, shown
from .crops import centred, drawn
from .order import draw_of, epoch_order

if TYPE_CHECKING:
    from .sources import ImageDataset

AUGMENTATIONS = ("none", "crop", "rrc", "rrc+jitter")
JITTER = 0.4  # brightness, contrast and saturation change by a factor of 1 - JITTER to 1 + JITTER
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
UNREADABLE_RUN = 100  # unreadable images in a row that end a run

Key = tuple[int, int]  # epoch, index
Unreadable = tuple[str, str]  # the name of an image, and the reason
Sample = tuple[Tensor | None, list[Unreadable]]  # an image (None: too many are unreadable), and the unreadable ones before it
Batch = tuple[Tensor, list[Unreadable]]  # images (N, C, H, W) uint8, and the unreadable ones


def colour_jitter(image: Tensor, draw: random.Random) -> Tensor:
    """Change brightness, contrast and, if C = 3, saturation of image (C, H, W) uint8 by random
    factors, in random order. Sums of integers make results independent of the number of threads."""
    changes = ["brightness", "contrast"] + (["saturation"] if len(image) == 3 else [])
    draw.shuffle(changes)
    weights = torch.tensor(LUMA if len(image) == 3 else (1 / len(image),) * len(image))
    for change in changes:
        factor = draw.uniform(1 - JITTER, 1 + JITTER)
        if change == "brightness":
            other = torch.zeros(())
        elif change == "contrast":
            other = (weights * image.sum(dim=(1, 2)) / image[0].numel()).sum()
        else:
            other = (weights[:, None, None] * image).sum(dim=0)
        image = (other + factor * (image - other)).round().clamp(0, 255).to(torch.uint8)
    return image


class Augmented(Dataset[Sample]):
    """The augmented images of `data`, by (epoch, index).

    augment  one of AUGMENTATIONS: as in `crops.drawn`; "rrc+jitter" is followed by colour_jitter
    flip     mirror half of the images
    An unreadable image is replaced by the next one and reported.
    """

    def __init__(self, data: "ImageDataset", size: tuple[int, int], augment: str, flip: bool, seed: int):
        self.data, self.size, self.augment, self.flip, self.seed = data, size, augment, flip, seed

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        unreadable = list[Unreadable]()
        while True:
            draw = draw_of(self.seed, epoch, index)
            view = drawn(draw, self.size, self.augment, self.flip)
            try:
                image = self.data.read(index, self.size, view.box)
            except UserError as error:
                unreadable.append(_named(error))
                if len(unreadable) == min(UNREADABLE_RUN, len(self.data)):
                    return None, unreadable  # an exception from a worker would have its traceback in the message
                index = (index + 1) % len(self.data)
                continue
            image = view.flipped(image)
            return colour_jitter(image, draw) if self.augment == "rrc+jitter" else image, unreadable

    def __getitems__(self, keys: list[Key]) -> list[Sample]:
        """Return the samples of a batch; DataLoader calls it."""
        if self.augment != "none" or self.flip:
            return [self[key] for key in keys]
        try:
            images = self.data.read_many([index for _, index in keys], self.size, partial(centred, size=self.size))
            return [(image, []) for image in images]
        except UserError:
            return [self[key] for key in keys]  # replaces and reports each unreadable image


def _named(error: UserError) -> Unreadable:
    return (shown(error.path), shown(error.why)) if isinstance(error, UnreadableImage) else (str(error), "")


def evenly_spaced(data: "ImageDataset", size: tuple[int, int], count: int) -> Iterator[Sample]:
    """Yield up to `count` images, evenly spaced; None and the reason for an unreadable one."""
    for index in torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist():
        try:
            yield data.read(index, size, partial(centred, size=size)), []
        except UserError as error:
            yield None, [_named(error)]


class Keys(Sampler[list[Key]]):
    """The keys of the first `batches` batches of each of `epochs`; the rest of an epoch is dropped.

    skip   batches of the first epoch that are done already
    share  (rank, size) of this process: it takes batch `rank` of every `size` batches
    """

    def __init__(
        self, count: int, batch_size: int, batches: int, seed: int, epochs: range, skip: int = 0, share: tuple[int, int] = (0, 1)
    ):
        self.count, self.batch_size, self.batches, self.seed = count, batch_size, batches, seed
        self.epochs, self.skip, self.share = epochs, skip, share

    def __iter__(self) -> Iterator[list[Key]]:
        rank, size = self.share
        for epoch in self.epochs:
            order = epoch_order(self.count, self.seed, epoch)
            for batch in range(self.skip if epoch == self.epochs.start else 0, self.batches):
                start = (batch * size + rank) * self.batch_size
                yield [(epoch, index) for index in order[start : start + self.batch_size]]

    def __len__(self) -> int:
        return max(0, len(self.epochs) * self.batches - self.skip)


def _collate(samples: list[Sample]) -> Sample:
    images = [image for image, _ in samples if image is not None]
    unreadable = [each for _, its in samples for each in its]
    return torch.stack(images) if len(images) == len(samples) else None, unreadable


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and a scheduler's signals, which reach all processes of the group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def load_batches(images: Augmented, keys: Keys, workers: int, pin_memory: bool) -> Generator[Batch]:
    """Yield uint8 batches (N, C, H, W) in the order of `keys`, each with its unreadable images.
    Raises UserError if too many images cannot be read."""
    loader = DataLoader(
        images,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # so that the global generator is not used
    )
    for images_or_none, unreadable in _reporting_deaths(iter(loader)) if workers else loader:
        if images_or_none is None:
            such = ": ".join(filter(None, unreadable[-1]))
            raise UserError(f"--data_path must hold images that can be read; too many cannot be read, such as {such}")
        yield images_or_none, unreadable


def _reporting_deaths(batches: Iterator[Sample]) -> Iterator[Sample]:
    """Yield the batches. If a worker's pipe breaks, wait for torch's SIGCHLD handler to say why."""
    try:
        yield from batches
    except (EOFError, OSError):
        time.sleep(1)
        raise


@contextmanager
def dead_workers_reported() -> Iterator[None]:
    """Raise UserError if a process that loads images dies; torch's handler may raise anywhere."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a process that loads images died ({error}); a smaller --num_workers needs less memory") from error
