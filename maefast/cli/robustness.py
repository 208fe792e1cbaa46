"""`maefast robustness`."""

import argparse
from pathlib import Path
from typing import Any

from ..train.evaluate.corruptions import CORRUPTIONS, SEVERITIES
from ..train.values import SEED, one_of, whole
from .flags import SPLITS, add_batch_size, add_device, add_nodata, choice

HELP = "score a classifier on corrupted images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pth of maefast finetune or partial")
    add("data", type=Path, metavar="DATA", nargs="?", help="images of its classes, scored clean and corrupted")
    choice(parser, "--eval_split", SPLITS, "the split of DATA to score (%(default)s)", default="val")
    add("--kinds", type=_kinds, metavar="KIND,..", help="kinds of corruption, or none (the 15 of ImageNet-C)")
    add("--severities", type=_severities, metavar="1,..", help="severities of 1 to 5 (all)")
    add("--count", type=whole(1), help="number of images of DATA, evenly spaced (all)")
    add("--folder", type=Path, metavar="DIR", help="other images of its classes, such as ImageNet-R")
    add("--class_map", type=Path, metavar="FILE", help="text file; each line is a folder in --folder and its class")
    add("--out", type=Path, metavar="FILE", help="JSON file of the figures")
    add_nodata(parser)
    add_batch_size(parser)
    add_device(parser)
    add("--seed", type=SEED, default=0, help="seed of the corruptions (%(default)s)")


def _kinds(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(map(one_of(CORRUPTIONS), text.split(",")))


def _severities(text: str) -> tuple[int, ...]:
    severity = one_of(tuple(map(str, SEVERITIES)))
    return tuple(int(severity(word)) for word in text.split(","))


def run(given: dict[str, Any]) -> None:
    from ..train.evaluate.robustness import Check, robustness

    checkpoint, out = given.pop("checkpoint"), given.pop("out")
    robustness(checkpoint, Check(**{name: value for name, value in given.items() if value is not None}), out)
