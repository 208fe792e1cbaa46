"""`maefast pack`."""

import argparse
from pathlib import Path
from typing import Any

from ..train.values import sides, whole
from .flags import SPLITS

HELP = "write images as one uint8 array, the format that is read fastest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="DIR", help="a folder of images, a list, or tar shards")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--split", choices=SPLITS, help="the split of DIR (all of it)")
    help = "side of the stored images in pixels, or height and width (%(default)s)"
    parser.add_argument("--size", type=sides, default=256, metavar="S | H W", help=help)
    parser.add_argument("--channels", type=whole(1), help="channels of the stored images (3 for most files)")


def run(given: dict[str, Any]) -> None:
    from ..train.data.pack import pack

    pack(**given)
