"""Text lists of images and their labels."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..errors import UserError, user_errors
from .folders import EXTENSIONS
from .labels import named, numbered
from .sources import MOST_DIGITS, FileImages

LISTS = (".txt", ".lst")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|[-+]?inf", re.IGNORECASE | re.ASCII)


def listed_images(path: Path, channels: int | None) -> FileImages:
    """Return the images of a list with lines `path` or `path label`.

    Paths are relative to the list's folder, or to the folder of its name, such as val/ for val.txt.
    Labels are all numbers (`labels.numbered`) or all names; -1 means no label.
    """
    with user_errors(OSError, UnicodeDecodeError, prefix=f"{path} cannot be read: "):
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    rows = {number: _list_row(line) for number, line in enumerate(lines, 1) if line}
    if not rows:
        raise UserError(f"{path} must list images, one per line; it is empty")
    files = _found(path, [name for name, _ in rows.values()])
    labels, classes = _labels(path, {number: label for number, (_, label) in rows.items()})
    images = FileImages(files, labels, classes, channels)
    images.kind = "list"
    return images


def _list_row(line: str) -> tuple[str, str | None]:
    name, *label = line.rsplit(maxsplit=1)
    return (line, None) if not label or Path(line).suffix.lower() in EXTENSIONS else (name, label[0])


def _found(path: Path, names: Sequence[str]) -> list[str]:
    """Return the files of these names. Raises UserError unless all exist."""
    files = [str(path.parent / name) for name in names]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        below = [str(path.with_suffix("") / name) for name in names]
        if not all(map(os.path.isfile, below)):
            raise UserError(f"{path} must list files that exist; {len(missing)} of {len(files)} do not, such as {missing[0]}")
        return below
    return files


def _labels(path: Path, texts: dict[int, str | None]) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels and classes. Raises UserError for broken numbers and names among numbers."""
    given = {line: text for line, text in texts.items() if text not in (None, "-1")}
    numbers = {line: text for line, text in given.items() if text is not None and NUMBER.fullmatch(text)}
    for line, text in numbers.items():
        if not text.isdigit() or len(text) > MOST_DIGITS:
            what = "names, whole numbers from 0 on, or -1 for no label"
            raise UserError(f"{path} must have labels that are {what}; in line {line} it is {text[: MOST_DIGITS + 1]!r}")
    if not numbers:
        return named([None if text == "-1" else text for text in texts.values()])
    if other := next((line for line in given if line not in numbers), None):
        first = next(iter(numbers))
        both = f"line {first} has {numbers[first]!r}, line {other} has {given[other]!r}"
        raise UserError(f"{path} must have labels that are all numbers or all names; {both}")
    return numbered([int(numbers.get(line, -1)) for line in texts])
