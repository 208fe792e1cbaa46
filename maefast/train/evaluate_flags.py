"""The flags of the commands of evaluate.py, and how each command is run from them."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from .augment import Augmentation, rand_policy
from .flags import RATIO, SEED, number, numbers, one_of, whole

SPLITS = ("train", "val", "test")
PART = number(0, 1, above=True)
RATE = number(0, 1, below=True)
CORRUPTIONS = (  # of ImageNet-C (Hendrycks, Dietterich 2019), by the names that imagecorruptions has
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost"),
    *("fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = ("1", "2", "3", "4", "5")


def _choice(parser: argparse.ArgumentParser, name: str, words: tuple[str, ...], help: str, default: str | None = None) -> None:
    parser.add_argument(name, type=one_of(words), metavar="|".join(words), default=default, help=help)


def _source_arguments(parser: argparse.ArgumentParser, *, moves: bool = True) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of any layout that maefast convert reads")
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder of images, a list of them, .npy, idx files or shards")
    parser.add_argument("--input_size", type=whole(1), help="side of the images, where not the checkpoint's")
    parser.add_argument("--num_heads", type=whole(1), help="of the encoder, where the checkpoint does not tell")
    parser.add_argument("--mean", type=numbers(0), metavar="M,M,..", help="of the pixels in 0..1 per channel, likewise")
    parser.add_argument("--std", type=numbers(0), metavar="S,S,..", help="likewise")
    parser.add_argument("--seed", type=SEED, default=0, help="of all that is drawn (%(default)s)")
    if moves:
        parser.add_argument("--random_init", action="store_true", help="the checkpoint's architecture with untrained weights")
        parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
        parser.add_argument(
            "--crop_pct", type=PART, help="part of the largest centred box, per side (0.875 from 224 pixels on, else 1)"
        )


def _labelled_arguments(parser: argparse.ArgumentParser) -> None:
    _choice(parser, "--train_split", SPLITS, "the part of DATA to learn from (%(default)s)", default="train")
    _choice(parser, "--eval_split", SPLITS, "the part of DATA to score (%(default)s)", default="val")
    parser.add_argument("--label_fraction", type=PART, default=1.0, help="of each class to learn from (%(default)s)")


def _recipe_arguments(parser: argparse.ArgumentParser, **defaults: float | None) -> None:
    for name, kind, help in (
        ("epochs", whole(1), "passes over the images"),
        ("warmup_epochs", whole(0), "epochs of linear warm-up"),
        ("batch_size", whole(1), "images a step"),
        ("min_lr", number(0), "where the cosine ends"),
        ("weight_decay", number(0), "of weights with more than one dimension"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=defaults[name], help=f"{help} (%(default)s)")
    shown = "the best of nine on held-out images" if defaults["blr"] is None else "%(default)s"
    help = f"base learning rate: lr = blr x images a step / 256 ({shown})"
    parser.add_argument("--blr", type=number(0), default=defaults["blr"], help=help)
    parser.add_argument("--lr", type=number(0), help="learning rate, instead of --blr")
    _choice(parser, "--augment", ("none", "rrc"), "rrc: random resized crops, mirrored or not", default="none")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="for log.txt and checkpoint.pth")


def extract(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="a .npy or .parquet file")
    _choice(parser, "--split", SPLITS, "the part of DATA (all of it)")
    _choice(parser, "--kind", ("cls", "mean", "all"), "token, or tokens (%(default)s)", default="cls")
    parser.add_argument("--batch_size", type=whole(1), default=256, help="images at a time (%(default)s)")


def knn(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    _labelled_arguments(parser)
    parser.add_argument("--k", type=whole(1), default=20, help="neighbours that vote (%(default)s)")
    parser.add_argument("--temperature", type=PART, default=0.07, help="of the votes (%(default)s)")
    _choice(parser, "--kind", ("cls", "mean"), "class token or mean of the others (%(default)s)", default="cls")
    parser.add_argument("--batch_size", type=whole(1), default=256, help="images at a time (%(default)s)")


def linprobe(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    _labelled_arguments(parser)
    _choice(parser, "--kind", ("cls", "mean"), "class token or mean of the others (%(default)s)", default="cls")
    _recipe_arguments(parser, epochs=90, warmup_epochs=10, batch_size=512, blr=None, min_lr=0.0, weight_decay=0.0)


def finetune(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    _labelled_arguments(parser)
    _recipe_arguments(parser, epochs=50, warmup_epochs=5, batch_size=64, blr=1e-3, min_lr=1e-6, weight_decay=0.05)
    parser.add_argument("--layer_decay", type=PART, default=0.75, help="of the learning rate, per layer below (%(default)s)")
    parser.add_argument("--drop_path", type=RATE, default=0.1, help="stochastic depth of the last block (%(default)s)")
    parser.add_argument("--smoothing", type=RATE, default=0.1, help="of the labels (%(default)s)")
    parser.add_argument("--accum_iter", type=whole(1), default=1, help="batches of one step of the optimizer (%(default)s)")
    parser.add_argument("--clip_grad", type=number(0, above=True), help="greatest norm of the gradient")
    parser.add_argument("--aa", type=rand_policy, metavar="rand-m9-mstd0.5-inc1", help="RandAugment (none)")
    parser.add_argument("--mixup", type=number(0), default=0.0, help="alpha of mixup (%(default)s)")
    parser.add_argument("--cutmix", type=number(0), default=0.0, help="alpha of cutmix (%(default)s)")
    parser.add_argument("--reprob", type=number(0, 1), default=0.0, help="part of the images with a part erased (%(default)s)")
    parser.add_argument("--eval_every", type=whole(1), default=1, help="epochs from one score to the next (%(default)s)")
    _choice(parser, "--resume", ("auto",), "go on with the run in --output_dir, if any")
    parser.add_argument("--ema", type=RATE, help="decay of an average of the weights, which is then scored")
    _choice(parser, "--amp", ("off", "bf16"), "autocast (%(default)s)", default="off")
    parser.add_argument(
        "--cls_token", dest="global_pool", action="store_false", help="read the class token, not the mean of the others"
    )


def partial(parser: argparse.ArgumentParser) -> None:
    finetune(parser)
    parser.add_argument("--blocks", type=number(0), required=True, help="how many of the last ones learn; 0.5: the last MLP")


def reconstruct(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser, moves=False)
    parser.add_argument("out", type=Path, metavar="OUT", help="a .png file")
    _choice(parser, "--split", SPLITS, "the part of DATA (all of it)")
    parser.add_argument("--decoder_num_heads", type=whole(1), help="of the decoder, where the checkpoint does not tell")
    parser.add_argument("--mask_ratio", type=RATIO, default=0.75, help="the part of the patches that is removed (%(default)s)")
    parser.add_argument("--count", type=whole(1), default=8, help="images (%(default)s)")


def robustness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pth of maefast finetune or partial")
    parser.add_argument(
        "data", type=Path, metavar="DATA", nargs="?", help="images of its classes, to be scored clean and corrupted"
    )
    _choice(parser, "--eval_split", SPLITS, "of DATA (%(default)s)", default="val")
    parser.add_argument("--kinds", type=_kinds, metavar="KIND,..", help="of corruption, or none (the 15 of ImageNet-C)")
    parser.add_argument("--severities", type=_severities, metavar="1,..", help="of 1 to 5 (all)")
    parser.add_argument("--count", type=whole(1), help="how many images of DATA, evenly spaced (all)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="other images of its classes, such as ImageNet-R")
    parser.add_argument("--class_map", type=Path, metavar="FILE", help="lines of a folder in --folder and the class that it is")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the figures as JSON")
    parser.add_argument("--batch_size", type=whole(1), default=256, help="images at a time (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="of the corruptions (%(default)s)")


def _kinds(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(map(one_of(CORRUPTIONS), text.split(",")))


def _severities(text: str) -> tuple[int, ...]:
    return tuple(int(one_of(SEVERITIES)(word)) for word in text.split(","))


def run_robustness(arguments: argparse.Namespace) -> None:
    from .robustness import Check, robustness

    given = {
        name: value
        for name, value in vars(arguments).items()
        if value is not None and name not in ("command", "checkpoint", "out")
    }
    robustness(arguments.checkpoint, Check(**given), arguments.out)


def _picked(cls: type[Any], arguments: argparse.Namespace, **others: Any) -> Any:
    """A dataclass of the arguments that have the names of its fields."""
    given = vars(arguments) | others
    return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


def run(arguments: argparse.Namespace) -> None:
    """Any of the commands of train/evaluate.py."""
    from . import evaluate
    from .supervised import Recipe

    a, source = arguments, _picked(evaluate.Source, arguments)
    if a.command in ("extract", "reconstruct"):
        names = ("kind", "batch_size", "crop_pct") if a.command == "extract" else ("mask_ratio", "count")
        getattr(evaluate, a.command)(source, a.data, a.split, a.out, **{name: getattr(a, name) for name in names})
        return
    data = _picked(evaluate.Labelled, arguments)
    if a.command == "knn":
        evaluate.knn(source, data, k=a.k, temperature=a.temperature, kind=a.kind, batch_size=a.batch_size)
        return
    sweep = a.blr is None and a.lr is None
    recipe = _picked(Recipe, arguments, label_smoothing=getattr(a, "smoothing", 0.0), blr=0.0 if a.blr is None else a.blr)
    if a.command == "linprobe":
        evaluate.linprobe(source, data, recipe, kind=a.kind, sweep=sweep, output_dir=a.output_dir)
    else:
        from .tuning import Output, Tuning, finetune

        output = Output(a.output_dir, a.resume is not None, a.eval_every)
        finetune(source, data, recipe, _picked(Tuning, arguments), _picked(Augmentation, arguments), output)
