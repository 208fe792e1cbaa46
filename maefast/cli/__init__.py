"""The command line, `maefast <command>`. An error is one line on stderr, with exit code 2.

Each command has a module with HELP, add_arguments(parser) and run(given), which takes the values of
the flags by name. What a command needs beyond torch is imported when it runs.
"""

import argparse
import sys
from collections.abc import Sequence

from .._version import __version__
from ..train.errors import ToldByAnother, UserError, shown
from . import ablate, convert, demo, extract, finetune, knn, linprobe, pack, partial, pretrain, reconstruct, robustness, submit
from .parser import Parser

LONGEST = 4096  # the most characters of an error
MODULES = (ablate, convert, extract, knn, linprobe, partial, finetune, robustness, reconstruct, demo, pack, pretrain, submit)
COMMANDS = {module.__name__.rpartition(".")[2]: module for module in MODULES}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="maefast", description="Masked Autoencoder pre-training with fused kernels.")
    parser.add_argument("--version", action="version", version=f"maefast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.HELP, description=command.HELP.capitalize() + "."))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 2 for errors of the user, 130 if interrupted."""
    given = vars(build_parser().parse_args(argv))
    command = given.pop("command")
    try:
        COMMANDS[command].run(given)
    except ToldByAnother:
        return 2
    except UserError as error:
        print(f"maefast {command}: error: {shown(str(error), LONGEST)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"maefast {command}: interrupted", file=sys.stderr)
        return 130
    return 0
