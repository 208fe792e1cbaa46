"""Files of images for the tests of data sets: pictures, arrays, idx files, tar shards, a folder."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def photograph(height: int, width: int) -> Image.Image:
    """Smooth, as photographs are, with a different picture in each channel."""
    y, x = np.mgrid[0:height, 0:width] / 40
    waves = [np.sin(x + 0.3 * y), np.cos(y), np.sin(0.5 * (x - y))]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).round().astype(np.uint8))


def as_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def images_array(n: int = 5, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(header + values.tobytes())


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def solid(value: int) -> bytes:
    return encoded(Image.new("RGB", (12, 10), (value, 0, 0)), "PNG")


def reds(data) -> list[int]:
    return [data.read(i)[0, 0, 0].item() for i in range(len(data))]


def write_folder(tmp_path: Path) -> Path:
    """train/cat 0, 1; train/dog 2; valid/cat 3."""
    for value, name in enumerate(("train/cat/0", "train/cat/1", "train/dog/2", "valid/cat/3")):
        path = tmp_path / "folder" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(solid(value))
    return tmp_path / "folder"
