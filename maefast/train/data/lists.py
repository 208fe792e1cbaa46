"""Text lists of images and their labels."""

import os
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .folders import EXTENSIONS
from .sources import FileImages

LISTS = (".txt", ".lst")


def in_order(names: list[str | None]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels by the alphabetical order of their names, -1 for None, and the names."""
    classes = tuple(sorted({name for name in names if name is not None}))
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([-1 if name is None else index[name] for name in names]), classes


def listed_images(path: Path, channels: int | None) -> FileImages:
    """A line is `path` or `path label`, the path relative to the list's folder; a line that ends as an image's name has no label.

    Labels that are all numbers are the classes' own, others are names, numbered in their order.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not lines:
        raise UserError(f"{path} must list images, one a line; it is empty")
    rows = [_list_row(line) for line in lines]
    files = [str(path.parent / name) for name, _ in rows]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(f"{path} lists {len(missing)} of {len(files)} files that are not there; the first is {missing[0]}")
    names = [label for _, label in rows]
    numbers = [int(name) for name in names if name is not None and name.isascii() and name.isdigit()]
    if len(numbers) == len(names) - names.count(None):
        labels = torch.tensor([-1 if name is None else int(name) for name in names])
        classes = tuple(str(label) for label in range(int(labels.max()) + 1))
    else:
        labels, classes = in_order(names)
    images = FileImages(files, labels, classes, channels)
    images.kind = "list"
    return images


def _list_row(line: str) -> tuple[str, str | None]:
    name, *label = line.rsplit(maxsplit=1)
    return (line, None) if not label or Path(line).suffix.lower() in EXTENSIONS else (name, label[0])
