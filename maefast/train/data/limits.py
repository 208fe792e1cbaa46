"""The number of values that an image may have, by the size of its file."""

FREE = 1 << 24  # values that a file of any size may declare
DENSEST = 4096  # values per byte of a file that declares more; only a blank one holds more (deflate: 1032 bytes)


def check_held(values: int, stored: int) -> None:
    """Raise ValueError if a header declares more values than `stored` bytes can hold. Decoding
    would first take memory for all of them."""
    if values > max(FREE, DENSEST * stored):
        raise ValueError(f"its header declares {values} values, its {stored} bytes hold at most {DENSEST * stored}")
