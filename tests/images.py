"""A data set in memory, for tests of what takes an ImageDataset."""

import torch
from torch import Tensor

from maefast.train.dataset import ImageDataset


class Stripes(ImageDataset):
    """Pictures of 64 x 64: of class 0 stripes that lie, of class 1 stripes that stand, with noise."""

    def __init__(self, count: int = 24, channels: int = 3, seed: int = 0):
        super().__init__(torch.arange(count) % 2, ("lying", "standing"), channels)
        generator = torch.Generator().manual_seed(seed)
        wave = ((torch.arange(64) // 4) % 2 * 160).expand(channels, 64, 64)
        pictures = torch.stack([wave if label else wave.mT for label in self.labels.tolist()])
        self.pictures = (pictures + torch.randint(90, pictures.shape, generator=generator)).to(torch.uint8)

    def _read(self, index: int, size: tuple[int, int] | None, box) -> Tensor:
        left, top, right, bottom = (0, 0, 64, 64) if box is None else map(round, box(64, 64))
        picture = self.pictures[index, :, top:bottom, left:right]
        if size is None or picture.shape[1:] == size:
            return picture
        resized = torch.nn.functional.interpolate(picture[None].float(), size, mode="bicubic", antialias=True)
        return resized[0].round().clamp(0, 255).to(torch.uint8)
