"""Data sets in memory, for tests of what takes an ImageDataset."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.train.data.crops import BoxOf, Size
from maefast.train.data.sources import ImageDataset
from maefast.train.errors import UserError


class MemoryImages(ImageDataset):
    """pictures (N, C, H, W) uint8; those of the indices `broken` cannot be read."""

    def __init__(self, pictures: Tensor, labels: Tensor, classes: tuple[str, ...], broken: tuple[int, ...] = ()):
        super().__init__(labels, classes, pictures.shape[1])
        self.pictures, self.broken = pictures, broken

    def _read(self, index: int, size: Size | None, box: BoxOf | None) -> Tensor:
        if index in self.broken:
            raise UserError(f"image-{index}.png cannot be read: it is broken")
        picture = self.pictures[index]
        left, top, right, bottom = (0, 0, *picture.shape[:0:-1]) if box is None else map(round, box(*picture.shape[1:]))
        part = picture[:, top:bottom, left:right]
        if size is None or part.shape[1:] == size:
            return part
        return F.interpolate(part[None].float(), size, mode="bicubic", antialias=True)[0].round().clamp(0, 255).to(torch.uint8)


def batches_of(x: Tensor, y: Tensor) -> Callable[[int, Iterable[Tensor]], Iterator[tuple[Tensor, Tensor]]]:
    """Return (epoch, ids) -> batches, as `fit` and `count_correct` take them."""
    return lambda epoch, ids: ((x[i], y[i]) for i in ids)


class Stripes(MemoryImages):
    """Pictures of 64 x 64 with noise: stripes that lie for class 0, that stand for class 1."""

    def __init__(self, count: int = 24, channels: int = 3, seed: int = 0):
        labels, generator = torch.arange(count) % 2, torch.Generator().manual_seed(seed)
        wave = ((torch.arange(64) // 4) % 2 * 160).expand(channels, 64, 64)
        pictures = torch.stack([wave if label else wave.mT for label in labels.tolist()])
        pictures = (pictures + torch.randint(90, pictures.shape, generator=generator)).to(torch.uint8)
        super().__init__(pictures, labels, ("lying", "standing"))
