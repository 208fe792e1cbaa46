"""What labels mean: numbers of classes, ids that are too great for that, or names."""

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_CLASSES = 1_000_000  # numbers from here on are ids, such as dates or taxa: a model has an output for each class


def named(names: Sequence[str | None]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels by the alphabetical order of names, -1 for None, and the names."""
    return _indexed(names, tuple(sorted({name for name in names if name is not None})))


def numbered(numbers: Sequence[int]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels from the numbers of classes, 0 or more, -1 for none, and the classes' names.

    Numbers stay as they are, and all up to the greatest are classes. Where that one is MOST_CLASSES or more, all are ids: classes
    are those that occur, in the order of the numbers.
    """
    greatest = max(numbers, default=-1)
    if greatest < MOST_CLASSES:
        return torch.tensor(numbers, dtype=torch.int64), tuple(map(str, range(greatest + 1)))
    ids = tuple(map(str, sorted(set(numbers) - {-1})))
    return _indexed([None if number < 0 else str(number) for number in numbers], ids)


def _indexed(names: Sequence[str | None], classes: tuple[str, ...]) -> tuple[Tensor, tuple[str, ...]]:
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([-1 if name is None else index[name] for name in names], dtype=torch.int64), classes
