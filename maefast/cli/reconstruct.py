"""`maefast reconstruct`."""

import argparse
from pathlib import Path
from typing import Any

from ..train.values import RATIO, whole
from .flags import SPLITS, add_source, choice, pick

HELP = "draw the reconstructions of masked images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser, moves=False)
    parser.add_argument("out", type=Path, metavar="OUT", help="a .png file")
    choice(parser, "--split", SPLITS, "the split of DATA (all of it)")
    parser.add_argument("--decoder_num_heads", type=whole(1), help="heads of the decoder, if the checkpoint does not store them")
    parser.add_argument("--mask_ratio", type=RATIO, default=0.75, help="fraction of the patches that is removed (%(default)s)")
    parser.add_argument("--count", type=whole(1), default=8, help="number of images (%(default)s)")


def run(given: dict[str, Any]) -> None:
    from ..train.evaluate.commands import reconstruct
    from ..train.evaluate.source import Source

    names = ("data", "split", "out", "mask_ratio", "count")
    reconstruct(pick(Source, given), **{name: given[name] for name in names})
