"""For the tests of pre-training: a tiny data set and a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.train import UserError
from maefast.train.dataset import ImageDataset
from maefast.train.options import Options

SIZES = {"input_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
SIZES |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
COUNT = 33


class ArrayImages(ImageDataset):
    """On a uint8 array (N, H, W, C); the images `broken` cannot be read."""

    def __init__(self, array: np.ndarray, broken: tuple[int, ...] = ()):
        super().__init__(torch.full((len(array),), -1), (), array.shape[-1])
        self.array, self.broken = array, broken

    def _read(self, index: int, size: tuple[int, int], box: Callable[[int, int], tuple[float, float, float, float]]) -> Tensor:
        if index in self.broken:
            raise UserError(f"image-{index}.png cannot be read: it is broken")
        image = torch.from_numpy(self.array[index]).permute(2, 0, 1)
        left, top, right, bottom = (round(edge) for edge in box(*image.shape[1:]))
        part = image[None, :, top:bottom, left:right].float()
        return F.interpolate(part, size, mode="bicubic", antialias=True)[0].round().clamp(0, 255).to(torch.uint8)


def pictures(count: int = COUNT, channels: int = 3) -> np.ndarray:
    """(count, 20, 20, channels) uint8: waves of random direction and phase."""
    draw = np.random.default_rng(0)
    a, b, phase = draw.uniform(0.2, 1, (3, count, 1, 1, channels))
    rows, cols = np.arange(20)[:, None, None], np.arange(20)[None, :, None]
    return (127.5 + 127.5 * np.sin(a * rows + b * cols + 6 * phase)).astype(np.uint8)


def options(output: Path, **changes: object) -> Options:
    """One epoch of the tiny model."""
    given = SIZES | {"epochs": 1, "warmup_epochs": 0, "batch_size": 8, "num_workers": 0, "pictures": 0, "output_dir": output}
    return Options(**(given | changes))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def flags(data: Path, output: Path, **options: object) -> list[str]:
    """Arguments of `maefast pretrain` for the tiny model."""
    options = SIZES | {"epochs": 2, "warmup_epochs": 1, "batch_size": 8, "blr": 1e-2, "num_workers": 0, "pictures": 0} | options
    named = {"data_path": data, "output_dir": output, **options}
    return ["pretrain", *(f"--{name}={value}" for name, value in named.items())]
