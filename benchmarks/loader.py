"""Images per second that one core reads for pre-training with random resized crops, the loader
alone.

    python benchmarks/loader.py [--rounds 7] [--images 24] [--out FILE]

The pictures are scikit-learn's two photographs, mirrored side by side to the size asked for and
saved as JPEG of quality 90. Against each other, on one thread and in turns, with the same crops:
torchvision's usual pipeline in plain Pillow and torch (decode, crop, resize, float, normalise: what
a model without uint8 kernels needs), and the sources of maefast, which return uint8. The files are
in the page cache. Prints a table, with the mean difference from the plain pipeline in grey levels
of 255, and writes results/<machine>/loader.json. Needs scikit-learn and pillow.
"""

import argparse
import io
import json
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
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from maefast.backbone import IMAGENET_MEAN, IMAGENET_STD
from maefast.train.data.crops import Box
from maefast.train.data.open import open_images
from maefast.train.data.pack import pack
from maefast.train.data.sources import ImageDataset

# ImageNet's average, and five megapixels
PHOTOGRAPHS = {"500 x 375": (375, 500), "2560 x 1920": (1920, 2560)}
SIDE = 224
MEAN, STD = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


def make_photographs(folder: Path, count: int, height: int, width: int) -> None:
    """Make JPEGs as detailed as a photograph of this size: tiled mirrored copies, each cropped at
    another place."""
    folder.mkdir()
    draw = random.Random(0)
    for i in range(count):
        pixels = load_sample_images().images[i % 2]
        block = np.concatenate([pixels, pixels[:, ::-1]], axis=1)
        block = np.concatenate([block, block[::-1]], axis=0)
        times = 1 + max(math.ceil(height / block.shape[0]), math.ceil(width / block.shape[1]))
        tiled = np.tile(block, (times, times, 1))
        top, left = draw.randrange(block.shape[0]), draw.randrange(block.shape[1])
        Image.fromarray(tiled[top : top + height, left : left + width]).save(folder / f"{i:03}.jpg", quality=90)


def make_shard(folder: Path, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)


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
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(MEAN).div_(STD)


def reader(data: ImageDataset) -> Callable[[int, int], Tensor]:
    return lambda i, seed: data.read(i, (SIDE, SIDE), lambda height, width: random_box(seed, height, width))


def measure(folder: Path, name: str, count: int, rounds: int) -> list[dict[str, Any]]:
    height, width = PHOTOGRAPHS[name]
    make_photographs(folder / "files", count, height, width)
    make_shard(folder / "files", folder / "shard.tar")
    with redirect_stdout(io.StringIO()):
        for side in (256, 512):
            pack(folder / "files", folder / f"packed-{side}", size=side)
    files = sorted((folder / "files").iterdir())
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
    bytes_each = {
        "files": sum(file.stat().st_size for file in files) / count,
        **{f"packed, {side}": 3.0 * side * side for side in (256, 512)},
    }
    baseline = seconds["plain Pillow, as torchvision"]
    rows = []
    for label, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(baseline, times, strict=True))
        row = {
            "photographs": name,
            "loader": label,
            "images_per_second": 1 / statistics.median(times),
            "ratio_to_plain": ratio,
            "bytes_per_image": bytes_each.get(label, bytes_each["files"]),
            "mean_difference": difference.get(label, 0.0),
            "seconds_per_image": times,
        }
        rows.append(row)
        print(
            f"{name:12} {label:30} {row['images_per_second']:7.0f} images/s {ratio:6.2f} x "
            f"{row['bytes_per_image'] / 1e3:7.0f} kB {row['mean_difference']:6.2f}"
        )
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
    out = args.out or Path(__file__).parent / "results" / info["machine"] / "loader.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine_info": info, "rows": rows}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
