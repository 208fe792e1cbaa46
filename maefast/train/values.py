"""Parsers of flag values: each returns a value or raises argparse.ArgumentTypeError."""

import argparse
import difflib
import math
from collections.abc import Callable, Collection
from typing import Any

Parse = Callable[[str], Any]


def nearest(word: str, words: Collection[str]) -> str:
    """Return "did you mean ...?" with the nearest of `words`, or a list of all if none is near."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(words)}"


def one_of(words: Collection[str]) -> Parse:
    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"must be a known name; it is {text!r}: {nearest(text, words)}")
        return text

    return parse


def several_of(words: Collection[str]) -> Parse:
    parse_one = one_of(words)
    return lambda text: list(dict.fromkeys(parse_one(part) for part in text.split(",")))


def whole(least: int) -> Parse:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more; it is {text!r}")
        return int(text)

    return parse


def number(least: float, most: float = math.inf, *, above: bool = False, below: bool = False) -> Parse:
    """Return a parser of numbers from `least` (excluded if `above`) to `most` (if `below`)."""
    limits = f" more than {least:g}" if above else f", {least:g} or more"
    limits = "" if least == -math.inf else limits
    if most != math.inf:
        limits += f" and below {most:g}" if below else f" and at most {most:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (least < value if above else least <= value) and (value < most if below else value <= most)
        if not inside or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a number{limits}; it is {text!r}")
        return value

    return parse


def numbers(least: float, *, above: bool = False) -> Parse:
    parse_one = number(least, above=above)
    return lambda text: tuple(parse_one(part) for part in text.strip("[]()").split(","))


def sides(text: str) -> int | tuple[int, int]:
    """Parse the side of a square, or height and width."""
    parse_one, words = whole(1), text.replace(",", " ").strip("[]()").split()
    if not 1 <= len(words) <= 2:
        raise argparse.ArgumentTypeError(f"must be one side, or height and width; it is {text!r}")
    height, width = map(parse_one, (words[0], words[-1]))
    return height if height == width else (height, width)


SEED = whole(0)
ANY = -math.inf  # the least of a number without limits
RATIO = number(0, 1, above=True, below=True)
