"""`maefast convert`."""

import argparse
from pathlib import Path
from typing import Any

from ..train.errors import user_errors
from ..train.values import whole
from .flags import add_key, add_switch

HELP = "write a checkpoint in the layout of another library"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="a checkpoint of any known layout: a file or a folder")
    add("out", type=Path, metavar="OUT", help="the file to write; for transformers a folder")
    add("--to", required=True, choices=("official", "transformers", "timm"), help="the layout to write")
    add_key(parser)
    add("--num_heads", type=whole(1), help="heads of the encoder, if the checkpoint does not store them")
    add("--decoder_num_heads", type=whole(1), help="heads of the decoder, if the checkpoint does not store them")
    help = "grid of the stored positions, if the checkpoint does not store it"
    add("--stored_grid", type=whole(1), nargs=2, metavar=("ROWS", "COLUMNS"), help=help)
    add_switch(parser, "norm_pix_loss", "the target was normalised pixels, if the checkpoint does not store it")


def run(given: dict[str, Any]) -> None:
    from .. import checkpoint

    with user_errors(checkpoint.CheckpointError, checkpoint.MissingPackageError, OSError):
        print(checkpoint.convert(**given))
