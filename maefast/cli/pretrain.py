"""`maefast pretrain`."""

from functools import partial
from typing import Any

from ..train.pretrain.options import from_arguments
from .flags import add_options

HELP = "pre-train an MAE on your own images"
add_arguments = add_options


def run(given: dict[str, Any]) -> None:
    from ..train.pretrain.build import training_images
    from ..train.pretrain.trainer import pretrain

    options = from_arguments(given)
    pretrain(options, partial(training_images, options))
