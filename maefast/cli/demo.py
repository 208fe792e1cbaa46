"""`maefast demo`."""

import argparse
from pathlib import Path
from typing import Any

from ..train.values import RATIO, SEED, whole

HELP = "pre-train a small MAE on real images and show what it learned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="a folder of images to train on, subfolders included (scikit-learn's images)")
    add("--output", type=Path, default="maefast-demo", metavar="DIR", help="folder of the results (%(default)s)")
    add("--steps", type=whole(1), help="pre-training steps of the main model; the other model's scale with it")
    add("--batch_size", type=whole(1), help="images per step; the learning rate scales with it")
    add("--mask_ratio", type=RATIO, help="fraction of the patches that is removed")
    add("--seed", type=SEED, default=0, help="seed of weights, data order, masks and draws (%(default)s)")


def run(given: dict[str, Any]) -> None:
    from ..train.demo.demo import demo

    demo(**given)
