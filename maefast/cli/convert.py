"""`maefast convert`."""

import argparse
from pathlib import Path
from typing import Any

from ..train.errors import UserError
from ..train.values import whole

HELP = "write a checkpoint in the layout of another library"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="a checkpoint of any known layout: a file, or a folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="where it goes; for transformers a folder")
    parser.add_argument("--to", required=True, choices=("official", "transformers", "timm"), help="the layout to write")
    parser.add_argument("--num-heads", type=whole(1), help="of the encoder, where the checkpoint does not tell")
    parser.add_argument("--decoder-num-heads", type=whole(1), help="of the decoder, where the checkpoint does not tell")
    parser.add_argument(
        "--stored-grid", type=whole(1), nargs=2, metavar=("ROWS", "COLUMNS"), help="of the stored positions, likewise"
    )
    parser.add_argument(
        "--norm-pix-loss", action=argparse.BooleanOptionalAction, help="whether the target was normalised pixels, likewise"
    )


def run(given: dict[str, Any]) -> None:
    from .. import checkpoint

    try:
        print(checkpoint.convert(**given))
    except (checkpoint.CheckpointError, checkpoint.MissingPackageError, OSError) as error:
        raise UserError(str(error)) from error
