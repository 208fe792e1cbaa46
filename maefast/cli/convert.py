"""`maefast convert`."""

import argparse
from pathlib import Path
from typing import Any

from ..train.errors import UserError
from ..train.values import whole
from .flags import add_key, add_switch

HELP = "write a checkpoint in the layout of another library"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="a checkpoint of any known layout: a file or a folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write; for transformers a folder")
    parser.add_argument("--to", required=True, choices=("official", "transformers", "timm"), help="the layout to write")
    add_key(parser)
    parser.add_argument("--num_heads", type=whole(1), help="heads of the encoder, if the checkpoint does not store them")
    parser.add_argument("--decoder_num_heads", type=whole(1), help="heads of the decoder, if the checkpoint does not store them")
    parser.add_argument(
        "--stored_grid",
        type=whole(1),
        nargs=2,
        metavar=("ROWS", "COLUMNS"),
        help="grid of the stored positions, if the checkpoint does not store it",
    )
    add_switch(parser, "norm_pix_loss", "the target was normalised pixels, if the checkpoint does not store it")


def run(given: dict[str, Any]) -> None:
    from .. import checkpoint

    try:
        print(checkpoint.convert(**given))
    except (checkpoint.CheckpointError, checkpoint.MissingPackageError, OSError) as error:
        raise UserError(str(error)) from error
