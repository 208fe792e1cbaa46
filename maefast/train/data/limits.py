"""How large an image may be: by Pillow's limit, and by what its file can hold."""

from typing import Any

FREE = 1 << 24  # values that a file of any size may declare
DENSEST = 4096  # values of a byte in a file that declares more; a blank one alone holds more than that (deflate: 1032 bytes)


def most_pixels() -> float:
    """Twice the number from which on Pillow warns, as it reads no more in any format."""
    from PIL import Image

    return float("inf") if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def check_bands(height: int, width: int, samples: int, dtype: Any, stored: int) -> None:
    """Raise ValueError for an image of more pixels than Pillow reads, of more bytes than RGBA of that many would have, or of more
    values than the `stored` bytes of its file can hold."""
    what, most = f"{width} x {height} pixels of {samples} x {8 * dtype.itemsize} bits", most_pixels()
    if height * width > most or height * width * samples * dtype.itemsize > 4 * most:
        raise ValueError(too_large(what))
    check_held(what, height * width * samples, stored)


def check_held(what: str, values: int, stored: int) -> None:
    """Raise ValueError for a header that declares more values than a file of `stored` bytes can hold: decoding would take memory
    for all of them first."""
    if values > max(FREE, DENSEST * stored):
        raise ValueError(f"it declares {what} and has {stored} bytes, too few for that")


def too_large(what: str) -> str:
    return f"it has {what}, more than are read ({most_pixels():.0f} pixels of 32 bits); cut it into parts"
