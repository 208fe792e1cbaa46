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
    add = parser.add_argument
    add("--layer_decay", type=PART, default=0.75, help="factor of the learning rate per layer below (%(default)s)")
    add("--drop_path", type=RATE, default=0.1, help="stochastic depth of the last block (%(default)s)")
    add("--smoothing", type=RATE, default=0.1, help="label smoothing (%(default)s)")
    add("--accum_iter", type=whole(1), default=1, help="batches per optimizer step (%(default)s)")
    add("--clip_grad", type=number(0, above=True), help="greatest norm of the gradient")
    add("--aa", type=rand_policy, metavar="rand-m9-mstd0.5-inc1", help="RandAugment (none)")
    add("--mixup", type=number(0), default=0.0, help="alpha of mixup (%(default)s)")
    add("--cutmix", type=number(0), default=0.0, help="alpha of cutmix (%(default)s)")
    add("--reprob", type=number(0, 1), default=0.0, help="fraction of images with a random rectangle erased (%(default)s)")
    add("--eval_every", type=whole(1), default=1, help="epochs between scores (%(default)s)")
    choice(parser, "--resume", ("auto",), "resume the run in --output_dir, if any")
    add("--ema", type=RATE, help="decay of an average of the weights, which is scored")
    choice(parser, "--amp", ("off", "bf16"), "autocast (%(default)s)", default="off")
    help = "classify from the class token instead of the mean of the patch tokens"
    add("--cls_token", dest="global_pool", action="store_false", help=help)


def run(given: dict[str, Any]) -> None:
    from ..train.data.labelled import Labelled
    from ..train.evaluate.finetune import Output, Tuning, finetune
    from ..train.evaluate.source import Source
    from ..train.evaluate.supervised import Recipe

    recipe = pick(Recipe, given, label_smoothing=given["smoothing"])
    output = Output(given["output_dir"], given["resume"] is not None, given["eval_every"])
    source, data = pick(Source, given), pick(Labelled, given)
    finetune(source, data, recipe, pick(Tuning, given), pick(Augmentation, given), output)
