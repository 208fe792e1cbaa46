"""`maefast ablate`."""

import argparse
from pathlib import Path
from typing import Any

from ..train.ablation.axes import AXES
from ..train.pretrain.options import with_config
from ..train.values import number, several_of, whole
from .flags import PART, SPLITS, add_options, add_val_path, pop

HELP = "repeat the paper's ablations on your own images"
FIXED = ("data_path", "resume", "init", "key", "start_epoch", "reference")
OF_SEVERAL_PROCESSES = ("fsdp", "world_size", "local_rank", "dist_on_itp", "dist_url")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="labelled images with a training split and a split to score")
    add("--axes", type=several_of(AXES), default=list(AXES), metavar="A,..", help=f"axes to run, of {', '.join(AXES)} (all)")
    add("--images", type=whole(1), help="number of images of DATA to pre-train on (all)")
    for name, kind, help in (
        ("label_fraction", PART, "fraction of each class to learn from with labels (1)"),
        ("probe_epochs", whole(1), "epochs of the linear probe (90)"),
        ("probe_blr", number(0), "base learning rate of the linear probe (the best of nine on held-out images)"),
        ("finetune_epochs", whole(1), "epochs of fine-tuning (50)"),
        ("finetune_blr", number(0), "base learning rate of fine-tuning (0.001)"),
    ):
        add(f"--{name}", type=kind, default=argparse.SUPPRESS, help=help)
    add("--eval_split", choices=SPLITS, default="val", help="the split of DATA to score (val)")
    add_val_path(parser)
    add_options(parser, without=FIXED + OF_SEVERAL_PROCESSES)


def run(given: dict[str, Any]) -> None:
    from ..train.ablation.ablate import Budget, ablate, base_options
    from ..train.pretrain.build import training_images

    data, axes, budget = given.pop("data"), given.pop("axes"), pop(Budget, given)
    base = base_options(with_config(given) | {"data_path": data})
    ablate(base, training_images(base), axes, budget)
