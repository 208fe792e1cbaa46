"""`maefast finetune`."""

import argparse
from typing import Any

from ..train.evaluate.augment import Augmentation, rand_policy
from ..train.values import number, whole
from .flags import PART, RATE, add_labelled, add_recipe, add_source, choice, pick

HELP = "fine-tune an encoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add_labelled(parser)
    add_recipe(parser, epochs=50, warmup_epochs=5, batch_size=64, blr=1e-3, min_lr=1e-6, weight_decay=0.05)
    parser.add_argument(
        "--layer_decay", type=PART, default=0.75, help="factor of the learning rate per layer below (%(default)s)"
    )
    parser.add_argument("--drop_path", type=RATE, default=0.1, help="stochastic depth of the last block (%(default)s)")
    parser.add_argument("--smoothing", type=RATE, default=0.1, help="label smoothing (%(default)s)")
    parser.add_argument("--accum_iter", type=whole(1), default=1, help="batches per optimizer step (%(default)s)")
    parser.add_argument("--clip_grad", type=number(0, above=True), help="greatest norm of the gradient")
    parser.add_argument("--aa", type=rand_policy, metavar="rand-m9-mstd0.5-inc1", help="RandAugment (none)")
    parser.add_argument("--mixup", type=number(0), default=0.0, help="alpha of mixup (%(default)s)")
    parser.add_argument("--cutmix", type=number(0), default=0.0, help="alpha of cutmix (%(default)s)")
    parser.add_argument(
        "--reprob", type=number(0, 1), default=0.0, help="fraction of images with a random rectangle erased (%(default)s)"
    )
    parser.add_argument("--eval_every", type=whole(1), default=1, help="epochs between scores (%(default)s)")
    choice(parser, "--resume", ("auto",), "resume the run in --output_dir, if any")
    parser.add_argument("--ema", type=RATE, help="decay of an average of the weights, which is scored")
    choice(parser, "--amp", ("off", "bf16"), "autocast (%(default)s)", default="off")
    parser.add_argument(
        "--cls_token",
        dest="global_pool",
        action="store_false",
        help="classify from the class token instead of the mean of the patch tokens",
    )


def run(given: dict[str, Any]) -> None:
    from ..train.data.labelled import Labelled
    from ..train.evaluate.finetune import Output, Tuning, finetune
    from ..train.evaluate.source import Source
    from ..train.evaluate.supervised import Recipe

    recipe = pick(Recipe, given, label_smoothing=given["smoothing"])
    output = Output(given["output_dir"], given["resume"] is not None, given["eval_every"])
    source, data = pick(Source, given), pick(Labelled, given)
    finetune(source, data, recipe, pick(Tuning, given), pick(Augmentation, given), output)
