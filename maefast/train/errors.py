"""Errors that the user can correct."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec


class UserError(Exception):
    """An error that the user can correct; the command line prints it and exits with code 2."""


class UnreadableImage(UserError):  # noqa: N818 - like UserError's, its text is for the user
    """An image that cannot be read: its path and the reason."""

    def __init__(self, path: str, why: str) -> None:
        # both as arguments, so that it pickles on its way out of a worker process
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"{shown(self.path)}: {shown(self.why)}"


def shown(text: str, most: int = 500) -> str:
    """Return one printable line of at most `most` characters, with control characters escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= most else f"{line[:most]}..."


class ToldByAnother(UserError):  # noqa: N818 - as above
    """An error in a process that does not print it, since the first process of the run does."""


@contextmanager
def user_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Raise an error of one of `kinds` as UserError, with `prefix` before its message."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error


def require(what: str, packages: Mapping[str, str], extra: str) -> None:
    """Raise UserError, `what` first, unless all `packages` (module -> name) are installed."""
    if missing := [name for module, name in packages.items() if find_spec(module) is None]:
        raise UserError(f'{what} {", ".join(missing)}: pip install "maefast[{extra}]"')
