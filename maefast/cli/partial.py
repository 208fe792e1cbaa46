"""`maefast partial`: `maefast finetune` of the last blocks."""

import argparse

from ..train.values import number
from . import finetune

HELP = "fine-tune the last blocks of an encoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    finetune.add_arguments(parser)
    parser.add_argument("--blocks", type=number(0), required=True, help="number of last blocks to train; 0.5: only the last MLP")


run = finetune.run
