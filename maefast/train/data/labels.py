"""Labels from indices of classes, from ids, or from names."""

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_CLASSES = 1_000_000  # greater numbers are ids, such as dates: a model has an output per class


def named(names: Sequence[str | None]) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels by the alphabetical order of names, -1 for None, and the sorted names."""
    return _indexed(names, tuple(sorted({name for name in names if name is not None})))


def numbered(numbers: Sequence[int]) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels and class names from numbers, -1 for no label.

    All numbers up to the greatest are classes. If that is MOST_CLASSES or more, the numbers are
    ids, and those that occur are the classes.
    """
    greatest = max(numbers, default=-1)
    if greatest < MOST_CLASSES:
        return torch.tensor(numbers, dtype=torch.int64), tuple(map(str, range(greatest + 1)))
    ids = tuple(map(str, sorted(set(numbers) - {-1})))
    return _indexed([None if number < 0 else str(number) for number in numbers], ids)


def _indexed(names: Sequence[str | None], classes: tuple[str, ...]) -> tuple[Tensor, tuple[str, ...]]:
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([-1 if name is None else index[name] for name in names], dtype=torch.int64), classes
