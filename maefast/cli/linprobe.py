"""`maefast linprobe`."""

import argparse
from typing import Any

from .flags import add_labelled, add_recipe, add_source, choice, pick

HELP = "score an encoder by a linear layer on its features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add_labelled(parser)
    choice(parser, "--kind", ("cls", "mean"), "class token or mean of the patch tokens (%(default)s)", default="cls")
    add_recipe(parser, epochs=90, warmup_epochs=10, batch_size=512, blr=None, min_lr=0.0, weight_decay=0.0)


def run(given: dict[str, Any]) -> None:
    from ..train.data.labelled import Labelled
    from ..train.evaluate.commands import linprobe
    from ..train.evaluate.source import Source
    from ..train.evaluate.supervised import Recipe

    given["sweep"] = given["blr"] is None and given["lr"] is None
    recipe = pick(Recipe, given, blr=given["blr"] or 0.0)
    options = {name: given[name] for name in ("kind", "sweep", "output_dir")}
    linprobe(pick(Source, given), pick(Labelled, given), recipe, **options)
