"""Flags that several commands share."""

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from ..train.pretrain.options import Options
from ..train.values import ANY, SEED, number, numbers, one_of, sides, whole

SPLITS = ("train", "val", "test")
PART = number(0, 1, above=True)
RATE = number(0, 1, below=True)

T = TypeVar("T")


def choice(parser: argparse.ArgumentParser, name: str, words: tuple[str, ...], help: str, default: str | None = None) -> None:
    parser.add_argument(name, type=one_of(words), metavar="|".join(words), default=default, help=help)


def add_source(parser: argparse.ArgumentParser, *, moves: bool = True) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint of any layout that maefast convert reads")
    add("data", type=Path, metavar="DATA", help="a folder of images, a list of them, .npy, idx files or shards")
    add_key(parser)
    add("--input_size", type=sides, metavar="S | H W", help="side of the images, or height and width (the checkpoint's)")
    add("--num_heads", type=whole(1), help="heads of the encoder, if the checkpoint does not store them")
    help = "mean per channel: of uint8 pixels in 0..1, of floats in their own unit"
    add("--mean", type=numbers(ANY), metavar="M,M,..", help=help)
    help = "standard deviation per channel, in the unit of --mean"
    add("--std", type=numbers(0, above=True), metavar="S,S,..", help=help)
    add_nodata(parser)
    add("--seed", type=SEED, default=0, help="seed of all random draws (%(default)s)")
    if moves:
        add("--random_init", action="store_true", help="the checkpoint's architecture with untrained weights")
        add_device(parser)
        add("--crop_pct", type=PART, help="scale of the centred box, per side (0.875 from 224 pixels on, else 1)")


def add_key(parser: argparse.ArgumentParser) -> None:
    help = "which of several models in the checkpoint to take: an entry, a prefix of names, or both joined by a dot"
    parser.add_argument("--key", help=help)


def add_nodata(parser: argparse.ArgumentParser) -> None:
    help = "value of a float array that means missing, as NaN does"
    parser.add_argument("--nodata", type=number(ANY), metavar="V", help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch_size", type=whole(1), default=256, help="images per batch (%(default)s)")


def add_labelled(parser: argparse.ArgumentParser) -> None:
    choice(parser, "--train_split", SPLITS, "the split of DATA to learn from (%(default)s)", default="train")
    choice(parser, "--eval_split", SPLITS, "the split of DATA to score (%(default)s)", default="val")
    add_val_path(parser)
    parser.add_argument("--label_fraction", type=PART, default=1.0, help="fraction of each class to learn from (%(default)s)")


def add_val_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--val_path", type=Path, metavar="PATH", help="the images to score, if they are not in DATA")


def add_recipe(parser: argparse.ArgumentParser, **defaults: float | None) -> None:
    for name, kind, help in (
        ("epochs", whole(1), "passes over the images"),
        ("warmup_epochs", whole(0), "epochs of linear warm-up"),
        ("batch_size", whole(1), "images per batch"),
        ("min_lr", number(0), "learning rate at the end of the cosine"),
        ("weight_decay", number(0), "weight decay of parameters with more than one dimension"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=defaults[name], help=f"{help} (%(default)s)")
    shown = "the best of nine on held-out images" if defaults["blr"] is None else "%(default)s"
    help = f"base learning rate: lr = blr x images per step / 256 ({shown})"
    parser.add_argument("--blr", type=number(0), default=defaults["blr"], help=help)
    parser.add_argument("--lr", type=number(0), help="learning rate, overrides --blr")
    choice(parser, "--augment", ("none", "rrc"), "rrc: random resized crops, half of them mirrored", default="none")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="folder of log.txt and checkpoint.pth")


def add_switch(parser: argparse.ArgumentParser, name: str, help: str, default: Any = None) -> None:
    """Add a flag --name and a flag --no_name."""
    parser.add_argument(f"--{name}", dest=name, default=default, action="store_true", help=help)
    parser.add_argument(f"--no_{name}", dest=name, default=default, action="store_false", help=f"not --{name}")


def add_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add a flag for each of Options but `without`, absent from the namespace unless given."""
    help = "a YAML file of options with the names of the flags; flags override it"
    parser.add_argument("--config", type=Path, metavar="FILE", help=help)
    for entry in fields(Options):
        if entry.name in without:
            continue
        name, parse, default = entry.name, entry.metadata["parse"], entry.default
        shown = "" if default is None or default == "" or parse is None else f" ({default})"
        help = f"{entry.metadata['help']}{shown}".replace("%", "%%")
        if parse is None:
            add_switch(parser, name, help, argparse.SUPPRESS)
        else:
            parser.add_argument(f"--{name}", type=parse, metavar=entry.metadata["metavar"], default=argparse.SUPPRESS, help=help)


def pick(cls: Callable[..., T], given: Mapping[str, Any], **others: Any) -> T:
    """Build a dataclass from the arguments that have the names of its fields."""
    return pop(cls, {**given, **others})


def pop(cls: Callable[..., T], given: dict[str, Any]) -> T:
    """Build a dataclass as `pick` does, and remove its arguments from `given`."""
    return cls(**{name: given.pop(name) for name in signature(cls).parameters if name in given})
