"""Decoding of image files of any mode and of arrays to uint8, cropped and resized in one step."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnreadableImage
from . import tiff
from .crops import Box, BoxOf, Size
from .limits import check_held
from .metadata import without_metadata
from .modes import MODES, converted, resized_by_bands, stored_as, with_16_bit_grey

if TYPE_CHECKING:
    from PIL.Image import Image

# Least size of a JPEG's crop, decoded at 1/2, 1/4 or 1/8, over the requested size. A smaller margin
# is visible; Pillow's thumbnail() has the same.
DRAFT_MARGIN = 2
LARGE = 1 << 25  # pixels of an image that is not held in memory twice


@contextmanager
def _blamed_on(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a decoder may raise anything on a broken file
        last = Path(name).name
        why = re.sub("<_io.BytesIO object at 0x[0-9a-f]+>", lambda found: repr(last), f"{type(error).__name__}: {error}")
        why = why.replace(repr(name)[1:-1], repr(last)[1:-1])  # as messages quote it
        raise UnreadableImage(name, " ".join(why.split())) from error


def part_of(box: BoxOf | None, height: int, width: int) -> Box:
    """Return the box in an image, all of it for None. Raises ValueError if it reaches beyond."""
    left, top, right, bottom = box(height, width) if box else (0, 0, width, height)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        must = "box must return 0 <= left < right <= width and 0 <= top < bottom <= height"
        raise ValueError(f"{must}; it is {(left, top, right, bottom)} for height {height} and width {width}")
    return left, top, right, bottom


def decode(name: str, file: str | bytes, channels: int, size: Size | None, box: BoxOf | None) -> Tensor:
    """Decode an image to uint8 (channels, *size), by the rules for modes in docs/data.md.

    name     its name in errors
    file     its path, or its bytes
    Raises UnreadableImage, but not for unreadable metadata.
    """
    try:
        return _decode(name, file, channels, size, box)
    except UnreadableImage as error:
        try:
            bare = without_metadata(file if isinstance(file, bytes) else Path(file).read_bytes())
            if bare is not None:
                return _decode(name, bare, channels, size, box)
        except (UnreadableImage, OSError):
            raise error from error.__cause__
        raise


def _decode(name: str, file: str | bytes, channels: int, size: Size | None, box: BoxOf | None) -> Tensor:
    with _blamed_on(name):
        image = _open(file, channels) if channels in MODES else None
        if image is None and not tiff.is_tiff(file):
            raise ValueError(f"only a TIFF can be read with {channels} channels")
        stored = tiff.read_tiff(file, channels) if image is None else None
    if stored is not None:
        with _blamed_on(name):
            turn = TURNS.get(stored.orientation, TURNS[1])
            bands = channels not in MODES or not stored.colours or (channels == 4 and stored.has_fourth_band)
            image = None if bands else tiff.as_picture(stored)
            pixels: Any = turn.turned(tiff.as_bands(stored, channels)) if bands else None
            if bands and not pixels.size:
                raise ValueError(f"it has {pixels.shape[0]} x {pixels.shape[1]} pixels")
        if bands:
            return resized(pixels, part_of(box, *pixels.shape[:2]), size)
    assert image is not None
    with image:
        with _blamed_on(name):
            if stored is None:
                turned = image.format == "TIFF"  # Pillow turns it in load(); releases before 11.1 change the size only then
                if turned:
                    image.load()
                turn = TURNS[1] if turned else TURNS.get(_orientation(image), TURNS[1])
                image = with_16_bit_grey(image, file)
            height, width = image.size if turn.swap else image.size[::-1]
            if not height or not width:
                raise ValueError(f"it has {height} x {width} pixels")
        part = part_of(box, height, width)
        out = size or (round(part[3] - part[1]), round(part[2] - part[0]))
        part, out = turn.stored(part, height, width), out[::-1] if turn.swap else out
        with _blamed_on(name):
            return turn.shown(_resized(image, channels, out, part)).contiguous()


class Turn(NamedTuple):
    """The orientation of an image: sides swapped, then mirrored."""

    swap: bool
    mirror_x: bool
    mirror_y: bool

    def stored(self, box: Box, height: int, width: int) -> Box:
        """Return a box of the upright image (height, width) in pixels of the stored image."""
        left, top, right, bottom = box
        if self.mirror_x:
            left, right = width - right, width - left
        if self.mirror_y:
            top, bottom = height - bottom, height - top
        return (top, left, bottom, right) if self.swap else (left, top, right, bottom)

    def shown(self, image: Tensor) -> Tensor:
        """Return an image (C, H, W) upright."""
        axes = [axis for axis, mirror in ((1, self.mirror_y), (2, self.mirror_x)) if mirror]
        image = image.transpose(1, 2) if self.swap else image
        return image.flip(axes) if axes else image

    def turned(self, pixels: Any) -> Any:
        """Return an array (H, W, C) upright."""
        pixels = pixels.transpose(1, 0, 2) if self.swap else pixels
        return pixels[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


TURNS = {exif: Turn(exif > 4, exif in (2, 3, 6, 7), exif in (3, 4, 7, 8)) for exif in range(1, 9)}


def _open(file: str | bytes, channels: int | None) -> Any:
    """Open an image with Pillow; None for a TIFF that Pillow cannot read or would misread."""
    from PIL import Image, UnidentifiedImageError

    try:
        image: Any = Image.open(BytesIO(file) if isinstance(file, bytes) else file)
    except UnidentifiedImageError:
        if tiff.is_tiff(file):
            return None
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(tiff.too_large(str(error).split("(")[1].split(")")[0])) from error
    check_held(image.width * image.height, len(file) if isinstance(file, bytes) else Path(file).stat().st_size)
    image.stored_as = stored_as(image)
    if image.format == "TIFF" and tiff.is_misread(image, channels):
        image.close()
        return None
    if image.format == "TIFF" and not isinstance(file, bytes) and image.tag_v2.get(tiff.ORIENTATION, 1) > 4:
        image.close()  # Pillow memory-maps an uncompressed file with the sides swapped; it reads bytes as they are
        return Image.open(BytesIO(Path(file).read_bytes()))
    return image


def _orientation(image: "Image") -> Any:
    """Return EXIF's orientation; 1 if the EXIF cannot be read, since the pixels still can."""
    try:
        return image.getexif().get(tiff.ORIENTATION, 1)
    except Exception:  # a parser may raise anything on broken metadata
        return 1


def _resized(image: "Image", channels: int, size: Size, box: Box) -> Tensor:
    from PIL import Image

    left, top, right, bottom = box
    factor = _draft(image, channels, min((bottom - top) / size[0], (right - left) / size[1]))
    box = left * factor, top * factor, min(right * factor, image.width), min(bottom * factor, image.height)
    if factor == 1 and size == (bottom - top, right - left) and left == int(left) and top == int(top):
        # resize would premultiply the colours and divide them again
        image = converted(image, MODES[channels])
        return _tensor(image.crop((int(left), int(top), int(right), int(bottom))))

    resize = methodcaller("resize", size[::-1], Image.Resampling.BICUBIC, box=box)
    if image.width * image.height > LARGE:
        return _tensor(resized_by_bands(image, MODES[channels], resize))
    return _tensor(resize(converted(image, MODES[channels])))


def _draft(image: Any, channels: int, reduction: float) -> float:
    """Set a JPEG to decode at a lower scale, in grey for one channel; return the scale, else 1."""
    if image.format != "JPEG":
        return 1.0
    times = max(1.0, reduction / DRAFT_MARGIN)
    width, height = image.size
    drafted = image.draft("L" if channels == 1 else "RGB", (math.floor(width / times), math.floor(height / times)))
    return drafted[1][2] / width if drafted else 1.0


def _tensor(image: "Image") -> Tensor:
    import numpy as np

    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def channels_of(name: str, file: str | bytes) -> int:
    """Return the number of bands of a TIFF that is no picture, else 3, also for a broken file."""
    try:
        with _blamed_on(name):
            image = _open(file, None)
            if image is None:
                stored = tiff.read_tiff(file, None)
                return 3 if stored.colours else int(stored.pixels.shape[-1])
        image.close()
    except UnreadableImage as error:
        if isinstance(error.__cause__, ImportError):
            raise
    return 3


def resized(pixels: Any, part: Box, size: Size | None) -> Tensor:
    """Return a part of an array (H, W, C), uint8 or fp32, resized to (C, *size), bicubic and
    antialiased. A value that depends on a NaN is NaN."""
    import numpy as np

    left, top, right, bottom = part
    out = size or (round(bottom - top), round(right - left))
    if out == (bottom - top, right - left) and left == int(left) and top == int(top):
        whole = np.array(pixels[int(top) : int(bottom), int(left) : int(right)])
        return torch.from_numpy(whole).permute(2, 0, 1).contiguous()
    from PIL import Image

    sides = (bottom - top, out[0]), (right - left, out[1])
    reach = [2 * max(1.0, side / new) + 1 for side, new in sides]  # bicubic's support, and one
    first_row, first_column = max(0, math.floor(top - reach[0])), max(0, math.floor(left - reach[1]))
    pixels = pixels[first_row : math.ceil(bottom + reach[0]), first_column : math.ceil(right + reach[1])]  # Pillow copies it
    part = left - first_column, top - first_row, right - first_column, bottom - first_row
    bands = [pixels] if pixels.shape[-1] == 3 and pixels.dtype == "uint8" else [pixels[..., i] for i in range(pixels.shape[-1])]
    images = (Image.fromarray(np.ascontiguousarray(band)) for band in bands)
    return torch.cat([_tensor(image.resize(out[::-1], Image.Resampling.BICUBIC, box=part)) for image in images])


def with_channels(image: Tensor, channels: int) -> Tensor:
    """Convert uint8 (..., C, H, W) of 1 or 3 channels to 1 (ITU-R 601-2, as Pillow), 3 or 4."""
    if image.shape[-3] == channels:
        return image
    if channels == 4:
        return torch.cat([with_channels(image, 3), torch.full_like(image[..., :1, :, :], 255)], dim=-3)
    if image.shape[-3] == 1:
        return image.expand(*image.shape[:-3], channels, -1, -1).contiguous()
    red, green, blue = image.int().unbind(dim=-3)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8).unsqueeze(-3)
