"""The parser of the command line."""

import argparse
import difflib
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Errors without the usage before them: one line, like every other error. An unknown flag is told the nearest one."""

    def __init__(self, **options: Any):
        self.flags = list[str]()
        super().__init__(**options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        self.flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = super().parse_known_args(args, namespace)
        flag = next((word.split("=")[0] for word in unknown if word.startswith("--")), None)
        if flag is not None and (near := difflib.get_close_matches(flag, self.flags, n=1)):
            self.error(f"unrecognized argument {flag}; did you mean {near[0]}?")
        return arguments, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")
