"""Where images come from: files, tar shards, arrays. Each is an ImageDataset; `open.open_images` chooses."""

import gzip
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UnreadableImage, UserError, require
from .axes import axes_told, likely_axes
from .crops import BoxOf, Size
from .decode import channels_of, decode, part_of, resized, with_channels
from .modes import MODES

EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


class ImageDataset:
    """Images with their labels, read one at a time from any process or thread; one subclass per kind of source.

    classes    names, () without labels
    labels     (len,) int64, -1 where there is none
    channels   of what `read` returns
    dtype      of what `read` returns: uint8, or fp32 for float arrays, in their own unit, with NaN for what is missing
    skipped    what `try_read` could not read, by index; a worker process has a list of its own
    """

    dtype = torch.uint8

    def __init__(self, labels: Tensor, classes: tuple[str, ...], channels: int) -> None:
        self.labels, self.classes, self.channels = labels, classes, channels
        self.skipped: dict[int, UnreadableImage] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, size: Size | None = None, box: BoxOf | None = None) -> Tensor:
        """uint8 (channels, *size): the part box(height, width) of an image, resized to `size` = (height, width).

        box    returns (left, top, right, bottom) in pixels of the stored image, fractions allowed; None: all of it
        size   None leaves the part as large as it is stored; resizing is bicubic and antialiased
        Raises UnreadableImage for a broken file, IndexError and ValueError for arguments.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0..{len(self) - 1}; it is {index}")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be (height, width), each 1 or more; it is {size}")
        return self._read(index, size, box)

    def try_read(self, index: int, size: Size | None = None, box: BoxOf | None = None) -> Tensor | None:
        """`read`, or None for a broken file, which joins `skipped`."""
        try:
            return self.read(index, size, box)
        except UnreadableImage as error:
            self.skipped[index] = error
            return None

    def read_many(self, indices: Sequence[int], size: Size, box: BoxOf) -> Tensor:
        """uint8 (n, channels, *size): `read` of each of n images, 1 or more, with one box, and its errors."""
        return torch.stack([self.read(index, size, box) for index in indices])

    def _read(self, index: int, size: Size | None, box: BoxOf | None) -> Tensor:
        raise NotImplementedError


class EncodedImages(ImageDataset):
    """Images decoded as they are read. `channels` None: 3, or the count of the first one if it is a TIFF beyond Pillow."""

    def __init__(self, labels: Tensor, classes: tuple[str, ...], channels: int | None) -> None:
        require("reading these images needs", {"PIL": "pillow"}, "train")
        super().__init__(labels, classes, channels or channels_of(*self.stored(0)))
        if self.channels not in MODES:
            require("reading these images needs", {"tifffile": "tifffile"}, "train")

    def stored(self, index: int) -> tuple[str, str | bytes]:
        """The name of an image, and its path or its bytes."""
        raise NotImplementedError

    def _read(self, index: int, size: Size | None, box: BoxOf | None) -> Tensor:
        return decode(*self.stored(index), self.channels, size, box)


class FileImages(EncodedImages):
    """One file per image."""

    def __init__(self, paths: Sequence[str], labels: Tensor, classes: tuple[str, ...], channels: int | None) -> None:
        self.paths = paths
        super().__init__(labels, classes, channels)

    def stored(self, index: int) -> tuple[str, str]:
        return self.paths[index], self.paths[index]


class TarImages(EncodedImages):
    """Members of uncompressed tar files by webdataset's naming: key.jpg (or any image), and the label as an integer in key.cls.

    The shards are scanned once; an image is then one seek and one read.
    """

    def __init__(self, shards: Sequence[Path], channels: int | None) -> None:
        self.shards, self.names, labels = shards, list[str](), list[int]()
        spans = list[tuple[int, int, int]]()
        for number, shard in enumerate(shards):
            images, shard_labels = _scan(shard)
            for key, member in images:
                self.names.append(member.name)
                spans.append((number, member.offset_data, member.size))
                labels.append(shard_labels.get(key, -1))
        if not spans:
            raise UserError(f"no image ({' '.join(sorted(EXTENSIONS))}) in {_listed(shards)}")
        self.spans = torch.tensor(spans)  # (len, 3): shard, offset, bytes
        classes = tuple(str(label) for label in range(max(labels) + 1))
        super().__init__(torch.tensor(labels), classes, channels)

    def stored(self, index: int) -> tuple[str, bytes]:
        shard, offset, size = self.spans[index].tolist()
        name = f"{self.shards[shard]}: {self.names[index]}"
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                return name, file.read(size)
        except OSError as error:
            raise UnreadableImage(name, error.strerror or str(error)) from error


def _listed(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} tar files beside {paths[0]}"


def _scan(shard: Path) -> tuple[list[tuple[str, tarfile.TarInfo]], dict[str, int]]:
    """The image members of a tar file with their keys, and the labels by key."""
    images, labels = list[tuple[str, tarfile.TarInfo]](), dict[str, int]()
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            for member in tar:
                end = tar.offset
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                key = f"{folder}/{stem}"
                if not member.isfile() or name.startswith("."):
                    continue
                if dot + extension.lower() in EXTENSIONS:
                    images.append((key, member))
                elif extension == "cls":
                    file.seek(member.offset_data)
                    labels[key] = _label(shard, member.name, file.read(member.size))
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end-of-archive block is missing, so the end may have been cut off")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard} cannot be read as an uncompressed tar file: {error}") from error
    return images, labels


def _label(shard: Path, name: str, content: bytes) -> int:
    text = content.strip()
    if not text.isdigit() or len(text) > 9:
        raise UserError(f"{name} in {shard} must hold a class number, 0 or more; it holds {content[:20]!r}")
    return int(text)


class ArrayImages(ImageDataset):
    """All images in one array of uint8 or floats: .npy, mapped into memory, or an idx file.

    path   axes (N, H, W), (N, H, W, C) or (N, C, H, W); which of the second and the last counts the channels is told by a file
           "axes", or by `channels` where one of them alone is as long, or else by "sizes", which go with NHWC; without any of
           these it is the smaller one, the last where they are equal
    Beside it, named with another word in place of "images", where there are such files: "labels"; "classes", a JSON list of
    names; "axes", NHWC or NCHW as a JSON string; "sizes", integers (N, 2) of height and width that `maefast pack` writes: the
    images were stretched to one size, and boxes are in pixels of the original.
    """

    def __init__(self, path: Path, channels: int | None) -> None:
        self.path = path
        self._values: Any = None
        self.nodata: float | None = None  # what stands for a missing value in floats, as NaN and infinities do
        shape = self.values.shape
        if self.values.dtype.kind == "f":
            self.dtype = torch.float32
        elif self.values.dtype != "uint8":
            raise UserError(f"{path} must hold uint8 or floats; it holds {self.values.dtype}")
        if len(shape) not in (3, 4) or 0 in shape:
            raise UserError(
                f"{path} must have the axes (N, H, W), (N, H, W, C) or (N, C, H, W), none empty; its shape is {shape}"
            )
        beside = {what: _beside(path, what) for what in ("labels", "sizes", "classes", "axes")}
        axes = axes_told(beside["axes"], shape) or likely_axes(shape, channels, beside["sizes"] is not None)
        self.channels_first = axes == "NCHW"
        stored = 1 if len(shape) == 3 else shape[axes.index("C")]
        channels = channels or stored
        if channels != stored and (stored not in (1, 3) or channels not in MODES or self.dtype != torch.uint8):
            raise UserError(f"channels must be {stored}, as {path} has in the axes {axes}, {shape}; it is {channels}")
        labels = torch.full((len(self.values),), -1)
        if beside["labels"]:
            labels = torch.from_numpy(_integers(beside["labels"], (len(labels),)))
        self.sizes = torch.from_numpy(_integers(beside["sizes"], (len(labels), 2))) if beside["sizes"] else None
        super().__init__(labels, _classes(beside["classes"], int(labels.max()) + 1), channels)

    @property
    def values(self) -> Any:
        if self._values is None:
            self._values = _array(self.path)
        return self._values

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_values": None}  # a worker process opens the file itself

    def read_many(self, indices: Sequence[int], size: Size, box: BoxOf) -> Tensor:
        if self.sizes is None and min(indices) >= 0 and max(indices) < len(self):
            values = self.values if self.values.ndim == 4 else self.values[..., None]
            values = values.transpose(0, 2, 3, 1) if self.channels_first else values
            left, top, right, bottom = part_of(box, *values.shape[1:3])
            if size == (bottom - top, right - left) and left == int(left) and top == int(top):  # nothing is resized
                pixels = self._present(values[list(indices), int(top) : int(bottom), int(left) : int(right)])
                return with_channels(torch.from_numpy(pixels).permute(0, 3, 1, 2), self.channels).contiguous()
        return super().read_many(indices, size, box)

    def _present(self, values: Any) -> Any:
        """Floats as fp32, NaN where there is none."""
        import numpy as np

        if values.dtype == "uint8":
            return values
        missing = ~np.isfinite(values)
        if self.nodata is not None:
            missing |= values == values.dtype.type(self.nodata)
        return np.where(missing, np.float32(np.nan), values).astype(np.float32)

    def _read(self, index: int, size: Size | None, box: BoxOf | None) -> Tensor:
        pixels = self._present(self.values[index])
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        elif self.channels_first:
            pixels = pixels.transpose(1, 2, 0)
        rows, columns = pixels.shape[:2]
        height, width = (rows, columns) if self.sizes is None else self.sizes[index].tolist()
        left, top, right, bottom = part_of(box, height, width)
        size = size or (round(bottom - top), round(right - left))
        part = (left * columns / width, top * rows / height, right * columns / width, bottom * rows / height)
        return with_channels(resized(pixels, part, size), self.channels)


def _beside(path: Path, what: str) -> Path | None:
    """The file that belongs to an images file by its name, None where there is none."""
    if "images" not in path.name:
        return None
    name = path.name.replace("images", what).replace("idx3", "idx1")
    if what in ("classes", "axes"):
        name = name.split(".")[0] + ".json"
    return path.with_name(name) if path.with_name(name).exists() else None


def _array(path: Path) -> Any:
    """The array in a .npy or idx file. Raises UserError."""
    import numpy as np

    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
        if content[:3] != b"\0\0\x08" or len(content) < 4:
            raise ValueError(f"it starts with {content[:3].hex() or 'nothing'}; idx files of uint8 start with 000008")
        axes = content[3]
        shape = tuple(np.frombuffer(content, ">i4", axes, offset=4).tolist())
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
        if values.size != np.prod(shape, dtype=np.int64):
            raise ValueError(f"it holds {values.size} bytes for the shape {shape}")
        return values.reshape(shape)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as {'.npy' if path.suffix == '.npy' else 'an idx file'}: {error}") from error


def _integers(path: Path, shape: tuple[int, ...]) -> Any:
    values = _array(path)
    if values.dtype.kind not in "iu" or values.shape != shape:
        raise UserError(f"{path} must hold integers of the shape {shape}; it holds {values.dtype} of the shape {values.shape}")
    return values.astype("int64")


def _classes(path: Path | None, count: int) -> tuple[str, ...]:
    """The names in a JSON list, numbers without one."""
    if path is None:
        return tuple(str(label) for label in range(count))
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(names, list) or len(names) < count:
        raise UserError(f"{path} must hold a JSON list of {count} class names or more")
    return tuple(str(name) for name in names)
