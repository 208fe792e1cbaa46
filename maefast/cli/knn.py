"""`maefast knn`."""

import argparse
from typing import Any

from ..train.values import whole
from .flags import PART, add_batch_size, add_labelled, add_source, choice, pick

HELP = "score an encoder by its nearest neighbours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add_labelled(parser)
    parser.add_argument("--k", type=whole(1), default=20, help="number of neighbours that vote (%(default)s)")
    parser.add_argument("--temperature", type=PART, default=0.07, help="temperature of the votes (%(default)s)")
    choice(parser, "--kind", ("cls", "mean"), "class token or mean of the patch tokens (%(default)s)", default="cls")
    add_batch_size(parser)


def run(given: dict[str, Any]) -> None:
    from ..train.data.labelled import Labelled
    from ..train.evaluate.commands import knn
    from ..train.evaluate.source import Source

    names = ("k", "temperature", "kind", "batch_size")
    knn(pick(Source, given), pick(Labelled, given), **{name: given[name] for name in names})
