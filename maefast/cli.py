"""The command line, `maefast <command>`: arguments in, one function called, errors as one line on stderr with exit code 2."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ._version import __version__
from .train import ToldByAnother, UserError, evaluate_flags, options, submit
from .train.axes import AXES
from .train.flags import RATIO, SEED, number, several_of, whole


class _Parser(argparse.ArgumentParser):
    """Errors without the usage before them: one line, like every other error. An unknown flag is told the nearest one."""

    def __init__(self, **options: Any):
        self.flags = list[str]()
        super().__init__(**options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        self.flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = super().parse_known_args(args, namespace)
        flag = next((word.split("=")[0] for word in unknown if word.startswith("--")), None)
        if flag is not None and (near := difflib.get_close_matches(flag, self.flags, n=1)):
            self.error(f"unrecognized argument {flag}; did you mean {near[0]}?")
        return arguments, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


@dataclass(frozen=True)
class Command:
    """A subcommand. Whatever it needs beyond torch is imported when it runs."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder of images to train on instead, subfolders included")
    parser.add_argument("--output", type=Path, default="maefast-demo", metavar="DIR", help="where the results go (%(default)s)")
    parser.add_argument("--steps", type=whole(1), help="pre-training steps of the main model; that of the photographs follows")
    parser.add_argument("--batch-size", type=whole(1), help="images a step; the learning rate scales along")
    parser.add_argument("--mask-ratio", type=RATIO, help="the part of the patches that is removed")
    parser.add_argument("--seed", type=SEED, default=0, help="of weights, data order, masks and draws (%(default)s)")


def _demo(arguments: argparse.Namespace) -> None:
    from .train.demo import demo

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    demo(**options)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
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


def _convert(arguments: argparse.Namespace) -> None:
    from . import checkpoint

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    try:
        print(checkpoint.convert(**options))
    except (checkpoint.CheckpointError, checkpoint.MissingPackageError, OSError) as error:
        raise UserError(str(error)) from error


def _pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="DIR", help="a folder of images, a list, or tar shards")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--split", choices=("train", "val", "test"), help="that subfolder of DIR alone")
    parser.add_argument("--size", type=whole(1), default=256, help="side of the stored images in pixels (%(default)s)")
    parser.add_argument("--channels", type=whole(1), help="of the stored images; 3 for most files")


def _pack(arguments: argparse.Namespace) -> None:
    from .train.pack import pack

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    pack(**options)


def _pretrain(arguments: argparse.Namespace) -> None:
    from .train.pretrain import pretrain
    from .train.setup import training_images

    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "config")}
    chosen = options.from_arguments(given, arguments.config)
    pretrain(chosen, partial(training_images, chosen))


def _ablate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="labelled images in a training part and one to score")
    parser.add_argument("--axes", type=several_of(AXES), default=list(AXES), metavar="A,..", help=f"of {', '.join(AXES)} (all)")
    parser.add_argument("--images", type=whole(1), help="how many of DATA to pre-train on (all)")
    for name, kind, help in (
        ("label_fraction", evaluate_flags.PART, "of each class, to learn from with labels (1)"),
        ("probe_epochs", whole(1), "of the linear probe (90)"),
        ("probe_blr", number(0), "its base learning rate (the best of nine on held-out images)"),
        ("finetune_epochs", whole(1), "of fine-tuning (50)"),
        ("finetune_blr", number(0), "its base learning rate (0.001)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=help)
    parser.add_argument("--eval_split", choices=evaluate_flags.SPLITS, default="val", help="the part of DATA to score (val)")
    of_several_processes = ("fsdp", "world_size", "local_rank", "dist_on_itp", "dist_url")
    options.add_arguments(parser, without=("data_path", "resume", "start_epoch", "reference", *of_several_processes))


def _ablate(arguments: argparse.Namespace) -> None:
    from .train import ablate
    from .train.setup import training_images

    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "config", "data", "axes")}
    budget = ablate.Budget(**{field.name: given.pop(field.name) for field in fields(ablate.Budget) if field.name in given})
    values = options.values_from(given, arguments.config) | {"data_path": arguments.data}
    base = ablate.base_options(values)
    ablate.ablate(base, training_images(base), arguments.axes, budget)


def _submit(arguments: argparse.Namespace) -> None:
    submit.submit({name: value for name, value in vars(arguments).items() if name != "command"})


COMMANDS = {
    "ablate": Command("compare what the paper compares, on images of your own", _ablate_arguments, _ablate),
    "convert": Command("write a checkpoint in the layout of another library", _convert_arguments, _convert),
    "extract": Command("write features of images to a file", evaluate_flags.extract, evaluate_flags.run),
    "knn": Command("score an encoder by its nearest neighbours", evaluate_flags.knn, evaluate_flags.run),
    "linprobe": Command("score an encoder by a linear layer on it", evaluate_flags.linprobe, evaluate_flags.run),
    "partial": Command("fine-tune the last blocks of an encoder", evaluate_flags.partial, evaluate_flags.run),
    "finetune": Command("fine-tune an encoder", evaluate_flags.finetune, evaluate_flags.run),
    "robustness": Command("score a classifier on corrupted images", evaluate_flags.robustness, evaluate_flags.run_robustness),
    "reconstruct": Command("picture what a model makes of masked images", evaluate_flags.reconstruct, evaluate_flags.run),
    "demo": Command("pre-train a small MAE on real images and show what it learned", _demo_arguments, _demo),
    "pack": Command("write images as one uint8 array, the form that is read fastest", _pack_arguments, _pack),
    "pretrain": Command("pre-train an MAE on images of your own", options.add_arguments, _pretrain),
    "submit": Command("pre-train as a SLURM job", submit.add_arguments, _submit),
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
    arguments = build_parser().parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
    except ToldByAnother:
        return 2
    except UserError as error:
        print(f"maefast {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"maefast {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return 0
