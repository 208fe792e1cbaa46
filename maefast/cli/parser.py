"""The parser of the command line."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..train.values import sides

FLAG = re.compile(r"(--[\w-]+)(=.*)?", re.DOTALL)
NEGATIVE = re.compile(r"-[\d.].*")


def with_underscores(words: Sequence[str]) -> list[str]:
    """Return the words with - in flags replaced by _, up to a bare --."""
    end = words.index("--") if "--" in words else len(words)
    found = [(word, FLAG.fullmatch(word)) for word in words[:end]]
    return [f"--{m[1][2:].replace('-', '_')}{m[2] or ''}" if m else word for word, m in found] + list(words[end:])


def joined(words: Sequence[str], pairs: Sequence[str]) -> list[str]:
    """Join a flag with its negative value, and a flag of `pairs` with two sides, to one word."""
    rest, out = list(words), list[str]()
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*out, word, *rest]
        if word in pairs and len(rest) > 1 and rest[0].isdigit() and rest[1].isdigit():
            word = f"{word}={rest.pop(0)},{rest.pop(0)}"
        elif word.startswith("--") and "=" not in word and rest and NEGATIVE.fullmatch(rest[0]):
            word = f"{word}={rest.pop(0)}"
        out.append(word)
    return out


class Parser(argparse.ArgumentParser):
    """A parser for which - and _ in flags are the same; an error is one line without the usage."""

    def __init__(self, **options: Any):
        self.flags, self.pairs = list[str](), list[str]()
        super().__init__(**options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        self.flags += [name for name in names if name.startswith("--")]
        self.pairs += names if options.get("type") is sides else ()
        return super().add_argument(*names, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = with_underscores(sys.argv[1:] if args is None else args)
        arguments, unknown = super().parse_known_args(joined(words, self.pairs), namespace)
        flag = next((word.split("=")[0] for word in unknown if word.startswith("--")), None)
        if flag is not None and (near := difflib.get_close_matches(flag, self.flags, n=1)):
            self.error(f"unrecognized argument {flag}; did you mean {near[0]}?")
        return arguments, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")
