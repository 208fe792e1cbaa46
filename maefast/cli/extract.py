"""`maefast extract`."""

import argparse
from pathlib import Path
from typing import Any

from .flags import SPLITS, add_batch_size, add_source, choice, pick

HELP = "write features of images to a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="a .npy or .parquet file")
    choice(parser, "--split", SPLITS, "the split of DATA (all of it)")
    help = "class token, mean of the patch tokens, or all tokens (%(default)s)"
    choice(parser, "--kind", ("cls", "mean", "all"), help, default="cls")
    add_batch_size(parser)


def run(given: dict[str, Any]) -> None:
    from ..train.evaluate.commands import extract
    from ..train.evaluate.source import Source

    names = ("data", "split", "out", "kind", "batch_size", "crop_pct")
    extract(pick(Source, given), **{name: given[name] for name in names})
