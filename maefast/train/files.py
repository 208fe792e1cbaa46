"""Output files, which are checked before the work and never half-written."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._files import replace_file
from .errors import UserError

__all__ = ["check_writable", "replace_file", "writing"]


def check_writable(folder: Path, option: str = "--output") -> None:
    """Raise UserError, naming `option`, unless `folder`, or the folder to create it in, can be
    written. Nothing is left behind."""
    existing = folder
    while not (existing.exists() or existing.is_symlink()) and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{option} must be a folder that can be written; {folder} cannot be: {reason}") from error


@contextmanager
def writing(argument: str, path: Path) -> Iterator[None]:
    """Raise UserError, naming `argument`, if the block cannot write `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{argument} must be a path that can be written; {path} cannot be: {error.strerror or error}") from error
