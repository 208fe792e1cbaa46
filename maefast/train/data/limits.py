"""How many values an image may have by what its file can hold."""

FREE = 1 << 24  # values that a file of any size may declare
DENSEST = 4096  # values of a byte in a file that declares more; a blank one alone holds more than that (deflate: 1032 bytes)


def check_held(values: int, stored: int) -> None:
    """Raise ValueError for a header that declares more values than a file of `stored` bytes can hold: decoding would take memory
    for all of them first."""
    if values > max(FREE, DENSEST * stored):
        raise ValueError(f"its header declares {values} values, its {stored} bytes hold at most {DENSEST * stored}")
