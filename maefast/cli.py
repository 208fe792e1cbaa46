"""The command line, `maefast <command>`: arguments in, one function called, errors as one line on stderr with exit code 2."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from ._version import __version__

SPLITS = ("train", "val", "test")


class _Parser(argparse.ArgumentParser):
    """Errors without the usage before them: one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


@dataclass(frozen=True)
class Command:
    """A subcommand. Whatever it needs beyond torch is imported when it runs."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more; it is {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1; it is {text!r}")
    return int(text)


def ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, both excluded; it is {text!r}")
    return value


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more; it is {text!r}")
    return int(text)


def amount(text: str) -> float:
    value = _finite(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number, 0 or more; it is {text!r}")
    return value


def part(text: str) -> float:
    value = _finite(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number more than 0 and at most 1; it is {text!r}")
    return value


def rate(text: str) -> float:
    value = _finite(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number, 0 or more and below 1; it is {text!r}")
    return value


def per_channel(text: str) -> tuple[float, ...]:
    return tuple(amount(value) for value in text.split(","))


def _finite(text: str) -> float:
    """NaN, which no comparison accepts, for what is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder of images to train on instead, subfolders included")
    parser.add_argument("--output", type=Path, default="maefast-demo", metavar="DIR", help="where the results go (%(default)s)")
    parser.add_argument(
        "--steps", type=positive_int, help="pre-training steps of the main model; that of the photographs follows"
    )
    parser.add_argument("--batch-size", type=positive_int, help="images a step; the learning rate scales along")
    parser.add_argument("--mask-ratio", type=ratio, help="the part of the patches that is removed")
    parser.add_argument("--seed", type=seed, default=0, help="of weights, data order, masks and draws (%(default)s)")


def _demo(arguments: argparse.Namespace) -> None:
    from .train.demo import demo

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    demo(**options)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="a checkpoint of any known layout: a file, or a folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="where it goes; for transformers a folder")
    parser.add_argument("--to", required=True, choices=("official", "transformers", "timm"), help="the layout to write")
    parser.add_argument("--num-heads", type=positive_int, help="of the encoder, where the checkpoint does not tell")
    parser.add_argument("--decoder-num-heads", type=positive_int, help="of the decoder, where the checkpoint does not tell")
    parser.add_argument(
        "--stored-grid", type=positive_int, nargs=2, metavar=("ROWS", "COLUMNS"), help="of the stored positions, likewise"
    )
    parser.add_argument(
        "--norm-pix-loss", action=argparse.BooleanOptionalAction, help="whether the target was normalised pixels, likewise"
    )


def _convert(arguments: argparse.Namespace) -> None:
    from . import checkpoint
    from .train import UserError

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    try:
        print(checkpoint.convert(**options))
    except (checkpoint.CheckpointError, checkpoint.MissingPackageError, OSError) as error:
        raise UserError(str(error)) from error


def _source_arguments(parser: argparse.ArgumentParser, *, moves: bool = True) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of any layout that maefast convert reads")
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder of images, a list of them, .npy, idx files or shards")
    parser.add_argument("--input_size", type=positive_int, help="side of the images, where not the checkpoint's")
    parser.add_argument("--num_heads", type=positive_int, help="of the encoder, where the checkpoint does not tell")
    parser.add_argument("--mean", type=per_channel, metavar="M,M,..", help="of the pixels in 0..1 per channel, likewise")
    parser.add_argument("--std", type=per_channel, metavar="S,S,..", help="likewise")
    parser.add_argument("--seed", type=seed, default=0, help="of all that is drawn (%(default)s)")
    if moves:
        parser.add_argument("--random_init", action="store_true", help="the checkpoint's architecture with untrained weights")
        parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
        parser.add_argument("--crop_pct", type=part, default=1.0, help="part of the largest centred box, per side (%(default)s)")


def _labelled_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train_split", choices=SPLITS, default="train", help="the part of DATA to learn from (%(default)s)")
    parser.add_argument("--eval_split", choices=SPLITS, default="val", help="the part of DATA to score (%(default)s)")
    parser.add_argument("--label_fraction", type=part, default=1.0, help="of each class to learn from (%(default)s)")


def _recipe_arguments(parser: argparse.ArgumentParser, **defaults: float) -> None:
    for name, kind, help in (
        ("epochs", positive_int, "passes over the images"),
        ("warmup_epochs", count, "epochs of linear warm-up"),
        ("batch_size", positive_int, "images a step"),
        ("blr", amount, "base learning rate: lr = blr x batch_size / 256"),
        ("min_lr", amount, "where the cosine ends"),
        ("weight_decay", amount, "of weights with more than one dimension"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=defaults[name], help=f"{help} (%(default)s)")
    parser.add_argument("--lr", type=amount, help="learning rate, instead of --blr")
    parser.add_argument("--augment", choices=("none", "rrc"), default="none", help="rrc: random resized crops, mirrored or not")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="for log.txt and checkpoint.pth")


def _extract_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="a .npy or .parquet file")
    parser.add_argument("--split", choices=SPLITS, help="the part of DATA (all of it)")
    parser.add_argument("--kind", choices=("cls", "mean", "all"), default="cls", help="token, or tokens (%(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=256, help="images at a time (%(default)s)")


def _knn_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    _labelled_arguments(parser)
    parser.add_argument("--k", type=positive_int, default=20, help="neighbours that vote (%(default)s)")
    parser.add_argument("--temperature", type=part, default=0.07, help="of the votes (%(default)s)")
    parser.add_argument("--kind", choices=("cls", "mean"), default="cls", help="class token or mean of the others (%(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=256, help="images at a time (%(default)s)")


def _linprobe_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    _labelled_arguments(parser)
    parser.add_argument("--kind", choices=("cls", "mean"), default="cls", help="class token or mean of the others (%(default)s)")
    _recipe_arguments(parser, epochs=90, warmup_epochs=10, batch_size=512, blr=0.1, min_lr=0.0, weight_decay=0.0)


def _finetune_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    _labelled_arguments(parser)
    _recipe_arguments(parser, epochs=50, warmup_epochs=5, batch_size=64, blr=1e-3, min_lr=1e-6, weight_decay=0.05)
    parser.add_argument("--layer_decay", type=part, default=0.75, help="of the learning rate, per layer below (%(default)s)")
    parser.add_argument("--drop_path", type=rate, default=0.1, help="stochastic depth of the last block (%(default)s)")
    parser.add_argument("--smoothing", type=rate, default=0.1, help="of the labels (%(default)s)")
    parser.add_argument("--ema", type=rate, help="decay of an average of the weights, which is then scored")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="autocast (%(default)s)")
    parser.add_argument(
        "--cls_token", dest="global_pool", action="store_false", help="read the class token, not the mean of the others"
    )


def _partial_arguments(parser: argparse.ArgumentParser) -> None:
    _finetune_arguments(parser)
    parser.add_argument("--blocks", type=amount, required=True, help="how many of the last ones learn; 0.5: the last MLP")


def _reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser, moves=False)
    parser.add_argument("out", type=Path, metavar="OUT", help="a .png file")
    parser.add_argument("--split", choices=SPLITS, help="the part of DATA (all of it)")
    parser.add_argument("--decoder_num_heads", type=positive_int, help="of the decoder, where the checkpoint does not tell")
    parser.add_argument("--mask_ratio", type=ratio, default=0.75, help="the part of the patches that is removed (%(default)s)")
    parser.add_argument("--count", type=positive_int, default=8, help="images (%(default)s)")


def _picked(cls: type[Any], arguments: argparse.Namespace, **others: Any) -> Any:
    """A dataclass of the arguments that have the names of its fields."""
    given = vars(arguments) | others
    return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


def _evaluate(arguments: argparse.Namespace) -> None:
    """Any of the commands of train/evaluate.py."""
    from .train import evaluate
    from .train.supervised import Recipe

    a, source = arguments, _picked(evaluate.Source, arguments)
    if a.command in ("extract", "reconstruct"):
        names = ("kind", "batch_size", "crop_pct") if a.command == "extract" else ("mask_ratio", "count")
        getattr(evaluate, a.command)(source, a.data, a.split, a.out, **{name: getattr(a, name) for name in names})
        return
    data = _picked(evaluate.Labelled, arguments)
    if a.command == "knn":
        evaluate.knn(source, data, k=a.k, temperature=a.temperature, kind=a.kind, batch_size=a.batch_size)
        return
    recipe = _picked(Recipe, arguments, label_smoothing=getattr(a, "smoothing", 0.0))
    if a.command == "linprobe":
        evaluate.linprobe(source, data, recipe, kind=a.kind, output_dir=a.output_dir)
    else:
        evaluate.finetune(source, data, recipe, _picked(evaluate.Tuning, arguments), output_dir=a.output_dir)


COMMANDS = {
    "convert": Command("write a checkpoint in the layout of another library", _convert_arguments, _convert),
    "extract": Command("write features of images to a file", _extract_arguments, _evaluate),
    "knn": Command("score an encoder by its nearest neighbours", _knn_arguments, _evaluate),
    "linprobe": Command("score an encoder by a linear layer on it", _linprobe_arguments, _evaluate),
    "partial": Command("fine-tune the last blocks of an encoder", _partial_arguments, _evaluate),
    "finetune": Command("fine-tune an encoder", _finetune_arguments, _evaluate),
    "reconstruct": Command("picture what a model makes of masked images", _reconstruct_arguments, _evaluate),
    "demo": Command("pre-train a small MAE on real images and show what it learned", _demo_arguments, _demo),
}


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="maefast", description="Masked Autoencoder pre-training at the speed of the hardware.")
    parser.add_argument("--version", action="version", version=f"maefast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.help, description=command.help.capitalize() + "."))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    from .train import UserError

    arguments = build_parser().parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
    except UserError as error:
        print(f"maefast {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"maefast {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return 0
