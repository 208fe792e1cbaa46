"""The checkpoint files of a run: written completely or not at all; the last few are kept."""

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .files import replace_file

NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.pth")
# What replace_file was writing when the process was killed.
LEFT_OVERS = (".checkpoint-*.pth.*", ".log.txt.*", "reconstructions/.epoch-*.png.*")


@dataclass(frozen=True, order=True)
class Position:
    """The position of a run: `step` optimizer steps of epoch `epoch` are done."""

    epoch: int
    step: int

    @property
    def file_name(self) -> str:
        """checkpoint-E.pth after epoch E, as in the official code; checkpoint-E-S.pth within it."""
        return f"checkpoint-{self.epoch}-{self.step}.pth" if self.step else f"checkpoint-{self.epoch - 1}.pth"


def find(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, the oldest first."""
    found = list[tuple[Position, Path]]()
    for name in os.listdir(folder) if folder.is_dir() else ():  # glob takes a folder that cannot be read for an empty one
        if match := NAME.fullmatch(name):
            epoch, step = int(match[1]), match[2]
            found.append((Position(epoch + 1, 0) if step is None else Position(epoch, int(step)), folder / name))
    return [path for _, path in sorted(found)]


def last_good(folder: Path) -> str:
    """Return the newest checkpoint, as part of a sentence."""
    there = find(folder)
    return f"the last good checkpoint is {there[-1]}" if there else "there is no checkpoint yet"


def save(entries: Mapping[str, Any], path: Path, keep: int) -> None:
    """Write a checkpoint and flush it to the disk; remove the oldest in its folder beyond `keep`.
    Raises UserError if it cannot be written; earlier checkpoints are then unchanged."""
    try:
        with replace_file(path) as temporary, temporary.open("wb") as file:
            torch.save(dict(entries), file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
        for old in find(path.parent)[:-keep]:
            old.unlink()
    except (OSError, RuntimeError) as error:  # torch's writer turns some errors of the file into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} cannot be written: {reason}; {last_good(path.parent)}") from error


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_left_overs(folder: Path) -> None:
    for pattern in LEFT_OVERS:
        for path in folder.glob(pattern):
            path.unlink()


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint of `save`, on the CPU, executing no code. Raises UserError for others."""
    must = f"--resume must be a checkpoint of maefast pretrain; {path}"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            entries = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--resume must be a checkpoint; {path} cannot be read: {error.strerror or error}") from error
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{must} is damaged or another kind: {reason}") from error
    if not isinstance(entries, dict) or not isinstance(entries.get("run"), dict):
        raise UserError(f"{must} is another kind (MAE.from_pretrained loads the weights of other kinds)")
    return entries


def must_agree(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError unless the checkpoint `path` belongs to the same run."""
    for name, value in wanted.items():
        if (other := stored.get(name)) != value:
            raise UserError(f"--resume must be a checkpoint of the same run; in {path} {name} is {other}, here it is {value}")
