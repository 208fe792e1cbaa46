"""What the pixels of an image mean: every mode of Pillow as grey, colours, or colours with transparency, of 8 bits."""

import zlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
HIGH_DEPTH_MODES = frozenset(("I", "I;16", "I;16L", "I;16B", "I;16N", "F"))
OTHER_COLOURS = frozenset(("CMYK", "YCbCr", "HSV"))
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF
# By what stored_as says of a PNG: what makes a transparent value of the file one of Pillow's pixels.
TRANSPARENT_VALUE = {"L;2": lambda value: value * 85, "L;4": lambda value: value * 17, "RGB;16B": lambda value: value >> 8}


def converted(image: "Image", mode: str) -> "Image":
    """An image of any mode in one of MODES; the rules are in docs/data.md."""
    from PIL import Image

    if image.mode in HIGH_DEPTH_MODES:
        image = _stretched_grey(image)
    elif image.mode == "LAB":
        image = _from_lab(image)
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode in OTHER_COLOURS:
        image = image.convert("RGB")
    if "transparency" in image.info and (scale := TRANSPARENT_VALUE.get(getattr(image, "stored_as", ""))):
        value = image.info["transparency"]
        image.info["transparency"] = tuple(map(scale, value)) if isinstance(value, tuple) else scale(value)
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _stretched_grey(image: "Image") -> "Image":
    """Grey of more than 8 bits in 8, with its transparency."""
    import numpy as np
    from PIL import Image

    values, hole = np.asarray(image), image.info.get("transparency")
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = Image.fromarray(stretched(-values.astype(np.float64)))
    else:
        grey = Image.fromarray(stretched(values))
    if isinstance(hole, int):
        grey.putalpha(Image.fromarray(np.where(values == hole, 0, 255).astype(np.uint8)))
    return grey


def _from_lab(image: "Image") -> "Image":
    from PIL import ImageCms

    profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
    colours = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    assert colours is not None  # which is for those that change in place
    return colours


def stored_as(image: Any) -> str:
    """Pillow's name for how a file that has not been decoded yet holds its pixels; empty where it does not say."""
    stored = image.tile[0][3] if getattr(image, "tile", None) else ""
    stored = stored[0] if isinstance(stored, tuple) and stored else stored
    return stored if isinstance(stored, str) else ""


def with_16_bit_grey(image: "Image", file: str | bytes) -> "Image":
    """A PNG of 16-bit grey with transparency, of which Pillow would keep the upper eight bits, stretched as other grey is; any
    other image as it is."""
    import numpy as np
    from PIL import Image

    if image.format != "PNG" or getattr(image, "stored_as", "") != "LA;16B":
        return image
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    # Two values of 16 bits take the room of four of 8: under a header that says so Pillow decodes the bytes as they are.
    header = content[12:24] + bytes((8, 6)) + content[26:29]
    content = content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
    with Image.open(BytesIO(content)) as halves:
        high, low, alpha, _ = np.asarray(halves).transpose(2, 0, 1)
    grey = Image.fromarray(stretched(high.astype(np.uint16) << 8 | low))
    grey.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
    return grey


def stretched(values: Any) -> Any:
    """An array of any real dtype as uint8, its least value at 0 and its greatest at 255, NaN at 0.

    Raises ValueError for infinities and complex values.
    """
    import numpy as np

    if values.dtype.kind == "c":
        raise ValueError(f"its pixels are {values.dtype}, which have no order")
    values = values.astype(np.float64)
    low, high = np.nanmin(values), np.nanmax(values)
    if not np.isfinite(high - low):
        raise ValueError("its pixels are not finite")
    return np.nan_to_num((values - low) * (255.0 / max(high - low, 1e-12))).round().astype(np.uint8)
