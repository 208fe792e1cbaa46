"""For the tests of pre-training: a tiny data set and a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import MemoryImages

from maefast.train import checkpoints
from maefast.train.pretrain.options import Options

SIZES = {"input_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
SIZES |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
COUNT = 33


class ArrayImages(MemoryImages):
    """On a uint8 array (N, H, W, C), without labels; the images `broken` cannot be read."""

    def __init__(self, array: np.ndarray, broken: tuple[int, ...] = ()):
        super().__init__(torch.from_numpy(array).permute(0, 3, 1, 2), torch.full((len(array),), -1), (), broken)


def pictures(count: int = COUNT, channels: int = 3) -> np.ndarray:
    """(count, 20, 20, channels) uint8: waves of random direction and phase."""
    a, b, phase = np.random.default_rng(0).uniform(0.2, 1, (3, count, 1, 1, channels))
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


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(record["epoch"], record["train_loss"], record["train_lr"]) for record in records(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read(checkpoints.find(folder)[-1])["model"]
