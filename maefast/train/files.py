"""Output files: checked before the work, never half-written."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import UserError


def check_writable(folder: Path) -> None:
    """Raise UserError unless `folder` can be made, or is there, and can be written. Leaves nothing behind."""
    existing = folder
    while not (existing.exists() or existing.is_symlink()) and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--output must be a folder that can be written; {folder} cannot be: {reason}") from error


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which becomes `path` at the end, or goes if there was an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
