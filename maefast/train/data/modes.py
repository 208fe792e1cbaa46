"""Conversion of every Pillow mode to 8-bit grey, colours, or colours with transparency."""

import math
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
HIGH_DEPTH_MODES = frozenset(("I", "I;16", "I;16L", "I;16B", "I;16N", "F"))
OTHER_COLOURS = frozenset(("CMYK", "YCbCr", "HSV"))
CHUNK = 1 << 20  # pixels that are converted at a time
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF
# stored_as of a PNG -> conversion of its transparent value to the value of Pillow's pixels.
TRANSPARENT_VALUE = {"L;2": lambda value: value * 85, "L;4": lambda value: value * 17, "RGB;16B": lambda value: value >> 8}


def converted(image: "Image", mode: str) -> "Image":
    """Convert an image of any mode to one of MODES; the rules are in docs/data.md."""
    return _colours(_in_8_bits(image), mode)


def _in_8_bits(image: "Image") -> "Image":
    """Return an image whose rows can be converted one by one."""
    if image.mode in HIGH_DEPTH_MODES:
        image = _stretched_grey(image)
    if "transparency" in image.info and (scale := TRANSPARENT_VALUE.get(getattr(image, "stored_as", ""))):
        value = image.info["transparency"]
        image.info["transparency"] = tuple(map(scale, value)) if isinstance(value, tuple) else scale(value)
    return image


def _colours(image: "Image", mode: str) -> "Image":
    from PIL import Image

    if image.mode == "LAB":
        image = _from_lab(image)
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode in OTHER_COLOURS:
        image = image.convert("RGB")
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def resized_by_bands(image: "Image", mode: str, resize: Callable[["Image"], "Image"]) -> "Image":
    """Return resize(converted(image, mode)) with only one band in memory beside the image."""
    from PIL import Image

    image = _in_8_bits(image)
    through = {"RGBA": "RGBa"}.get(mode, mode)  # as resize does: transparent colours count as little as they show
    bands = []
    for i in range(len(mode)):
        band = Image.new("L", image.size)
        for top in range(0, image.height, rows := max(1, CHUNK // image.width)):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            band.paste(_colours(strip, mode).convert(through).getchannel(i), (0, top))
        bands.append(resize(band))
    merged = Image.merge(mode, bands)
    return merged if through == mode else Image.frombytes(through, merged.size, merged.tobytes()).convert(mode)


def _stretched_grey(image: "Image") -> "Image":
    """Convert grey of more than 8 bits, with its transparency, to 8 bits."""
    import numpy as np
    from PIL import Image

    hole = image.info.get("transparency")
    inverted = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
    grey = Image.fromarray(stretched(_Rows(image), inverted))
    if isinstance(hole, int):
        grey.putalpha(Image.fromarray(np.where(np.asarray(image) == hole, 0, 255).astype(np.uint8)))
    return grey


class _Rows:
    """The rows of an image as arrays, copied when a slice is taken."""

    def __init__(self, image: "Image"):
        self.image, self.shape = image, image.size[::-1]

    def __getitem__(self, rows: slice) -> Any:
        import numpy as np

        return np.asarray(self.image.crop((0, rows.start, self.shape[1], min(rows.stop, self.shape[0]))))


def _from_lab(image: "Image") -> "Image":
    from PIL import ImageCms

    profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
    colours = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    assert colours is not None  # it is None only for changes in place
    return colours


def stored_as(image: Any) -> str:
    """Return Pillow's raw mode of an image that is not decoded yet; empty if it states none."""
    stored = image.tile[0][3] if getattr(image, "tile", None) else ""
    stored = stored[0] if isinstance(stored, tuple) and stored else stored
    return stored if isinstance(stored, str) else ""


def with_16_bit_grey(image: "Image", file: str | bytes) -> "Image":
    """Stretch a PNG of 16-bit grey with transparency, of which Pillow keeps only the upper eight
    bits. Any other image is returned unchanged."""
    import numpy as np
    from PIL import Image

    if image.format != "PNG" or getattr(image, "stored_as", "") != "LA;16B":
        return image
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    # With a header for RGBA of 8 bits, Pillow decodes the bytes of two 16-bit values unchanged.
    header = content[12:24] + bytes((8, 6)) + content[26:29]
    content = content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
    with Image.open(BytesIO(content)) as halves:
        high, low, alpha, _ = np.asarray(halves).transpose(2, 0, 1)
    grey = Image.fromarray(stretched(high.astype(np.uint16) << 8 | low))
    grey.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
    return grey


def stretched(values: Any, inverted: bool = False) -> Any:
    """Stretch an array of any real dtype to uint8 from 0, the least value, to 255; NaN becomes 0.

    inverted    from 255, the least value, to 0
    Raises ValueError for infinities and complex values.
    """
    import numpy as np

    rows = max(1, CHUNK * values.shape[0] // max(1, math.prod(values.shape)))
    parts = [slice(top, top + rows) for top in range(0, values.shape[0], rows)]
    low = high = math.nan
    for part in parts:
        if (piece := values[part]).dtype.kind == "c":
            raise ValueError(f"its pixels are {piece.dtype}, which have no order")
        low = float(np.fmin(low, np.fmin.reduce(piece, axis=None)))
        high = float(np.fmax(high, np.fmax.reduce(piece, axis=None)))
    if not np.isfinite(high - low):
        raise ValueError("its pixels are not finite")
    start, scale = (high, -255.0) if inverted else (low, 255.0)
    scale /= max(high - low, 1e-12)
    out = np.empty(values.shape, np.uint8)
    for part in parts:
        out[part] = np.nan_to_num((values[part].astype(np.float64) - start) * scale).round()
    return out
