"""Images per second that one core reads for pre-training with random resized crops.

    python benchmarks/loader.py [--rounds 7] [--images 24] [--out FILE]

prints a table and writes results/<machine>/loader.json. Two contenders run in turns on one thread,
with the same crops and with the files in the page cache. The plain one is torchvision's pipeline
in Pillow and torch: decode, crop, resize, float, normalise. The sources of maefast return uint8.
The table has the mean difference between both in grey levels. The pictures are scikit-learn's two
photographs, tiled to the size asked for, as JPEG of quality 90. Needs scikit-learn and pillow.
"""

import argparse
import io
import math
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import machine
import numpy as np
import report
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from maefast.backbone import IMAGENET_MEAN, IMAGENET_STD
from maefast.train.data.crops import Box
from maefast.train.data.open import open_images
from maefast.train.data.pack import pack
from maefast.train.data.sources import ImageDataset

PHOTOGRAPHS = {"500 x 375": (375, 500), "2560 x 1920": (1920, 2560)}  # ImageNet's average, and five megapixels
SIDE = 224
MEAN, STD = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


def make_photographs(folder: Path, count: int, height: int, width: int) -> None:
    """Make JPEGs as detailed as a photograph: tiled mirrored copies, each cropped elsewhere."""
    folder.mkdir()
    draw = random.Random(0)
    for i in range(count):
        pixels = load_sample_images().images[i % 2]
        block = np.concatenate([pixels, pixels[:, ::-1]], axis=1)
        block = np.concatenate([block, block[::-1]], axis=0)
        tiled = np.pad(block, ((0, height), (0, width), (0, 0)), mode="wrap")
        top, left = draw.randrange(block.shape[0]), draw.randrange(block.shape[1])
        Image.fromarray(tiled[top : top + height, left : left + width]).save(folder / f"{i:03}.jpg", quality=90)


def random_box(seed: int, height: int, width: int) -> Box:
    """Draw a random resized crop as MAE does: 0.2 to 1 of the area, an aspect of 3/4 to 4/3."""
    draw = random.Random(seed)
    while True:
        area = height * width * draw.uniform(0.2, 1)
        aspect = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h


def plain(file: Path, seed: int) -> Tensor:
    with open(file, "rb") as stream:
        image = Image.open(stream).convert("RGB")
    image = image.crop(random_box(seed, image.height, image.width)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255).sub_(MEAN).div_(STD)


def reader(data: ImageDataset) -> Callable[[int, int], Tensor]:
    return lambda i, seed: data.read(i, (SIDE, SIDE), lambda height, width: random_box(seed, height, width))


def measure(folder: Path, name: str, count: int, rounds: int) -> list[dict[str, Any]]:
    height, width = PHOTOGRAPHS[name]
    make_photographs(folder / "files", count, height, width)
    files = sorted((folder / "files").iterdir())
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for file in files:
            tar.add(file, file.name)
    with redirect_stdout(io.StringIO()):
        for side in (256, 512):
            pack(folder / "files", folder / f"packed-{side}", size=side)
    contenders: dict[str, Callable[[int, int], Tensor]] = {
        "plain Pillow, as torchvision": lambda i, seed: plain(files[i], seed),
        "folder": reader(open_images(folder / "files")),
        "tar shard": reader(open_images(folder / "shard.tar")),
        "packed, 256": reader(open_images(folder / "packed-256")),
        "packed, 512": reader(open_images(folder / "packed-512")),
    }
    references = [(plain(files[i], i) * STD + MEAN) * 255 for i in range(count)]
    difference = {
        label: statistics.fmean((read(i, i).float() - references[i]).abs().mean().item() for i in range(count))
        for label, read in contenders.items()
        if not label.startswith("plain")
    }
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    for turn in range(rounds):
        for label, read in contenders.items():
            start = time.perf_counter()
            for i in range(count):
                read(i, turn * count + i)
            seconds[label].append((time.perf_counter() - start) / count)
    bytes_of_file = sum(file.stat().st_size for file in files) / count
    bytes_each = {f"packed, {side}": 3.0 * side * side for side in (256, 512)}
    baseline = seconds["plain Pillow, as torchvision"]
    rows = []
    for label, times in seconds.items():
        row = {
            "photographs": name,
            "loader": label,
            "images_per_second": 1 / statistics.median(times),
            "ratio_to_plain": statistics.median(a / b for a, b in zip(baseline, times, strict=True)),
            "bytes_per_image": bytes_each.get(label, bytes_of_file),
            "mean_difference": difference.get(label, 0.0),
            "seconds_per_image": times,
        }
        rows.append(row)
        speed = f"{row['images_per_second']:7.0f} images/s {row['ratio_to_plain']:6.2f} x"
        print(f"{name:12} {label:30} {speed} {row['bytes_per_image'] / 1e3:7.0f} kB {row['mean_difference']:6.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=24, help="of each size")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/<machine>/loader.json")
    args = parser.parse_args()
    info = machine.describe(torch.device("cpu")) | {"threads": 1, "pillow": Image.__version__}
    torch.set_num_threads(1)
    rows = []
    for name in PHOTOGRAPHS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(Path(folder), name, args.images, args.rounds)
    print(report.write_rows("loader", info, rows, args.out))


if __name__ == "__main__":
    main()
