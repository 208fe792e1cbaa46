"""Sources of images: files, tar shards, arrays. `open.open_images` chooses the ImageDataset."""

import math
import posixpath
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UnreadableImage, UserError, require, shown
from .arrays import find_beside, read_array, read_classes, read_integers
from .axes import axes_told, likely_axes
from .crops import BoxOf, Size
from .decode import channels_of, decode, part_of, resized, with_channels
from .folders import COMMON, check_one_split, is_hidden, listed, readable_extensions
from .labels import numbered
from .limits import FREE
from .modes import MODES

MOST_DIGITS = 40  # of a label


class ImageDataset:
    """Images with labels, read one at a time from any process or thread.

    classes    names, () without labels
    labels     (len,) int64, -1 for no label
    channels   of the images that `read` returns
    dtype      of these images: uint8, or fp32 for float arrays, in their own unit, NaN for missing
    skipped    errors of `try_read`, by index; each worker process has its own
    source     the path and the kind; left_out  the number of files that were ignored, by reason
    """

    kind = "images"
    dtype = torch.uint8

    def __init__(self, labels: Tensor, classes: tuple[str, ...], channels: int) -> None:
        self.labels, self.classes, self.channels = labels, classes, channels
        self.skipped: dict[int, UnreadableImage] = {}
        self.source, self.left_out = self.kind, Counter[str]()

    def __len__(self) -> int:
        return len(self.labels)

    def described(self) -> str:
        """Return a line about the data set."""
        unlabelled = int((self.labels < 0).sum())
        labels = f"{len(self.classes)} classes{f', {unlabelled} images without a label' if unlabelled else ''}"
        labels = labels if self.classes else "no labels"
        left_out = f"; left out: {listed(self.left_out)}" if self.left_out else ""
        return shown(f"{self.source}: {len(self)} images, {labels}{left_out}", 4096)

    def read(self, index: int, size: Size | None = None, box: BoxOf | None = None) -> Tensor:
        """Return a part of an image, uint8 (channels, *size).

        size   (height, width); resizing is bicubic and antialiased. None: no resizing
        box    maps (height, width) to (left, top, right, bottom) in pixels of the original,
               fractions allowed. None: the whole image
        Raises UnreadableImage for a broken file, IndexError and ValueError for arguments.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0..{len(self) - 1}; it is {index}")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be (height, width), each 1 or more; it is {size}")
        return self._read(index, size, box)

    def try_read(self, index: int, size: Size | None = None, box: BoxOf | None = None) -> Tensor | None:
        """Call `read`; for a broken file, add the error to `skipped` and return None."""
        try:
            return self.read(index, size, box)
        except UnreadableImage as error:
            self.skipped[index] = error
            return None

    def read_many(self, indices: Sequence[int], size: Size, box: BoxOf) -> Tensor:
        """Return one or more images, uint8 (n, channels, *size), as `read` does, with one box."""
        return torch.stack([self.read(index, size, box) for index in indices])

    def _read(self, index: int, size: Size | None, box: BoxOf | None) -> Tensor:
        raise NotImplementedError


class EncodedImages(ImageDataset):
    """Encoded images. `channels` None: 3, or the number of bands of the first one if a TIFF."""

    def __init__(self, labels: Tensor, classes: tuple[str, ...], channels: int | None) -> None:
        require("reading these images needs", {"PIL": "pillow"}, "train")
        super().__init__(labels, classes, channels or channels_of(*self.stored(0)))
        if self.channels not in MODES:
            require("reading these images needs", {"tifffile": "tifffile"}, "train")

    def stored(self, index: int) -> tuple[str, str | bytes]:
        """Return the name of an image, and its path or its bytes."""
        raise NotImplementedError

    def _read(self, index: int, size: Size | None, box: BoxOf | None) -> Tensor:
        return decode(*self.stored(index), self.channels, size, box)


class FileImages(EncodedImages):
    """One file per image."""

    kind = "image files"

    def __init__(self, paths: Sequence[str], labels: Tensor, classes: tuple[str, ...], channels: int | None) -> None:
        self.paths = paths
        super().__init__(labels, classes, channels)

    def stored(self, index: int) -> tuple[str, str]:
        return self.paths[index], self.paths[index]


class TarImages(EncodedImages):
    """Members of uncompressed tar files with webdataset's names: key.jpg, the label in key.cls. The
    shards are scanned once. An image then needs one seek and one read."""

    kind = "tar shards"

    def __init__(self, shards: Sequence[Path], channels: int | None) -> None:
        self.shards, self.names, labels = shards, list[str](), list[int]()
        spans, left_out = list[tuple[int, int, int]](), Counter[str]()
        for number, shard in enumerate(shards):
            images, shard_labels = _scan(shard, left_out)
            check_one_split(shard, (name for _, (name, _, _) in images))
            for key, (name, offset, size) in images:
                self.names.append(name)
                spans.append((number, offset, size))
                labels.append(shard_labels.get(key, -1))
        if not spans:
            places = str(shards[0]) if len(shards) == 1 else f"{len(shards)} tar files beside {shards[0]}"
            raise UserError(f"{places} must hold images ({COMMON}); there is none")
        self.spans = torch.tensor(spans)  # (len, 3): shard, offset, bytes
        super().__init__(*numbered(labels), channels)
        self.left_out = left_out

    def stored(self, index: int) -> tuple[str, bytes]:
        shard, offset, size = self.spans[index].tolist()
        name = f"{self.shards[shard]}: {self.names[index]}"
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                return name, file.read(size)
        except OSError as error:
            raise UnreadableImage(name, error.strerror or str(error)) from error


def _scan(shard: Path, left_out: Counter[str]) -> tuple[list[tuple[str, tuple[str, int, int]]], dict[str, int]]:
    """Return the images of a tar file as (key, (name, offset, size)), and the labels by key."""
    images, labels = list[tuple[str, tuple[str, int, int]]](), dict[str, int]()
    stored, sparse = dict[str, tuple[int, int]](), (tarfile.GNUTYPE_SPARSE,)
    extensions = readable_extensions()
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            for member in tar:
                if tar.offset <= end:
                    raise tarfile.ReadError(f"the size of {member.name} leads back to a place that has been read")
                end = tar.offset
                name = posixpath.normpath(member.name)
                if member.isfile() and member.type not in sparse:
                    stored[name] = member.offset_data, member.size
                elif member.islnk():  # a hard link: its content was stored before
                    stored[name] = stored.get(posixpath.normpath(member.linkname), (0, 0))
                elif not member.isdir():
                    left_out["links or special files"] += 1
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end-of-archive block is missing, so the end may have been cut off")
            samples = {key_of(name)[0] for name in stored if key_of(name)[1] in extensions}
            for name, (offset, size) in stored.items():
                key, extension = key_of(name)
                base, last = posixpath.splitext(name)
                if any(map(is_hidden, name.split("/"))):
                    left_out["hidden"] += 1
                elif extension == ".cls" or (last == ".cls" and key not in samples):
                    file.seek(offset)
                    labels[key if extension == ".cls" else base] = _label(shard, name, file.read(min(size, tarfile.BLOCKSIZE)))
                elif extension in extensions:
                    images.append((key, (name, offset, size)))
                elif last.lower() in extensions and key not in samples:  # the name itself has dots
                    images.append((base, (name, offset, size)))
                else:
                    left_out[f"of another format ({extension or 'no ending'})"] += 1
    except UserError:
        raise
    except Exception as error:  # broken bytes may raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{shard} cannot be read as an uncompressed tar file: {why}") from error
    return images, labels


def key_of(name: str) -> tuple[str, str]:
    """Split a member's name at its first dot into key and extension, as webdataset does."""
    folder, name = posixpath.split(name)
    stem, dot, extension = name.partition(".")
    return posixpath.join(folder, stem), (dot + extension).lower()


def _label(shard: Path, name: str, content: bytes) -> int:
    text = content.strip()
    if text != b"-1" and not (text.isdigit() and len(text) <= MOST_DIGITS):
        raise UserError(f"{name} in {shard} must hold the number of a class, 0 or more; it holds {content[:20]!r}")
    return int(text)


class ArrayImages(ImageDataset):
    """All images in one array of uint8 or floats: .npy, memory-mapped, or an idx file.

    path   an array (N, H, W), (N, H, W, C) or (N, C, H, W)
    Optional files beside it have another word in place of "images" in their names:
    labels     integers (N,), -1 for no label
    classes    a JSON list of names
    axes       "NHWC" or "NCHW" as JSON. Without it, the channels are on the axis whose length is
               `channels`; if both or neither match, on the last axis if there are sizes, else on
               the shorter one, or on the last one if both are equal
    sizes      integers (N, 2), height and width, written by `maefast pack`: the images are
               stretched to one size, and boxes are in pixels of the original
    """

    kind = "array"

    def __init__(self, path: Path, channels: int | None) -> None:
        self.path = path
        self._values: Any = None
        self.nodata: float | None = None  # a value of floats that means missing, as NaN and infinities do
        shape = self.values.shape
        if self.values.dtype.kind == "f":
            self.dtype = torch.float32
        elif self.values.dtype != "uint8":
            raise UserError(f"{path} must hold uint8 or floats; it holds {self.values.dtype}")
        if len(shape) not in (3, 4) or 0 in shape:
            axes = "(N, H, W), (N, H, W, C) or (N, C, H, W), none empty"
            raise UserError(f"{path} must have the axes {axes}; its shape is {shape}")
        beside = {what: find_beside(path, what) for what in ("labels", "sizes", "classes", "axes")}
        axes = axes_told(beside["axes"], shape) or likely_axes(shape, channels, beside["sizes"] is not None)
        self.channels_first = axes == "NCHW"
        stored = 1 if len(shape) == 3 else shape[axes.index("C")]
        channels = channels or stored
        if channels != stored and (stored not in (1, 3) or channels not in MODES or self.dtype != torch.uint8):
            where = f"as in {path} with the axes {axes} and the shape {shape}"
            raise UserError(f"channels must be {stored}, {where}; it is {channels}")
        count = len(self.values)
        numbers = read_integers(beside["labels"], (count,)).tolist() if beside["labels"] else [-1] * count
        if min(numbers) < -1:
            raise UserError(f"{beside['labels']} must hold numbers of classes, or -1 for no label; it holds {min(numbers)}")
        sizes = read_integers(beside["sizes"], (count, 2)).astype("int64") if beside["sizes"] else None
        if sizes is not None and sizes.min() < 1:
            raise UserError(f"{beside['sizes']} must hold heights and widths, each 1 or more; it holds another number")
        self.sizes = None if sizes is None else torch.from_numpy(sizes)
        labels, classes = numbered(numbers)
        if beside["classes"]:
            labels, classes = torch.tensor(numbers), read_classes(beside["classes"], max(numbers) + 1)
        super().__init__(labels, classes, channels)

    @property
    def values(self) -> Any:
        if self._values is None:
            self._values = read_array(self.path)
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
        """Return floats as fp32, with NaN for missing values; uint8 unchanged."""
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
        if min(size) < 1 or math.prod(size) > FREE:
            what = f"its original has {height} x {width} pixels, and more than {FREE} were requested; give a smaller size"
            raise UnreadableImage(f"{self.path}: image {index}", what)
        part = (left * columns / width, top * rows / height, right * columns / width, bottom * rows / height)
        return with_channels(resized(pixels, part, size), self.channels)
