"""`maefast finetune` and `maefast partial`, in a run that can be resumed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import checkpoints
from ..data.crops import still
from ..data.labelled import Labelled, augmented, reading
from ..data.open import tell
from ..errors import UserError, user_errors
from ..optim import adamw
from . import supervised
from .augment import NO_AUGMENTATION, Augment, Augmentation
from .classifier import described
from .layers import layer_decay_groups, reset_head, train_last_blocks
from .log import Log, check_run
from .source import Source, prepared
from .supervised import Recipe

HEAD_STD = 2e-5


@dataclass(frozen=True)
class Tuning:
    """Settings of fine-tuning that concern the encoder."""

    blocks: float | None = None  # the number of last blocks to train; None: the whole model
    layer_decay: float = 0.75
    drop_path: float = 0.1
    global_pool: bool = True
    ema: float | None = None  # decay of an average of the weights, which is scored; None: no average
    amp: str = "off"


@dataclass(frozen=True)
class Output:
    """The folder of log.txt and checkpoint.pth; with `resume` also of the last checkpoint-E.pth."""

    folder: Path | None = None
    resume: bool = False
    eval_every: int = 1  # epochs between scores; the last epoch is always scored


def finetune(
    source: Source,
    data: Labelled,
    recipe: Recipe,
    tuning: Tuning = Tuning(),
    augmentation: Augmentation = NO_AUGMENTATION,
    output: Output = Output(),
) -> None:
    """Fine-tune the encoder, or its last blocks, and print its accuracy."""
    augmentation.check()
    if output.resume and output.folder is None:
        raise UserError("--resume must be given together with --output_dir, the folder of the run")
    encoder, train, evaluated = prepared(source, data, drop_path_rate=tuning.drop_path, global_pool=tuning.global_pool)
    check_run(recipe, train, output.folder)
    if augmentation.aa is not None and train.dtype != torch.uint8:
        raise UserError("--aa must be none for float images, which have no colours; DATA holds floats")
    classes = train.images.classes
    encoder.num_classes = len(classes)
    encoder.head = nn.Linear(encoder.embed_dim, encoder.num_classes).to(source.device)
    reset_head(encoder, HEAD_STD)
    if tuning.blocks is not None:
        with user_errors(ValueError, prefix="--"):
            train_last_blocks(encoder, tuning.blocks)
    average = None if tuning.ema is None else AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(tuning.ema))
    optimizer = adamw(layer_decay_groups(encoder, recipe.weight_decay, tuning.layer_decay), recipe.peak, betas=(0.9, 0.999))
    learning: dict[str, Any] = {"model": encoder, "optimizer": optimizer} | ({} if average is None else {"average": average})
    identity = _identity(source, data, recipe, tuning, augmentation, len(train))
    records = _resumed(output, learning, identity)
    tell(train.images, evaluated)

    size = encoder.patch_embed.img_size
    view = still(size, data.crop_pct)
    scored = reading(evaluated, size, lambda epoch: view)
    batches = reading(train, size, lambda epoch: view) if data.augment == "none" else augmented(train, size, recipe.seed)
    change = Augment(augmentation, encoder, len(classes)) if augmentation else None
    autocast = torch.bfloat16 if tuning.amp == "bf16" else None
    judged: Any = encoder if average is None else average.module
    log = Log(output.folder, records)
    options: dict[str, Any] = {"autocast": autocast, "average": average, "change": change, "start": len(records)}
    for epoch in supervised.fit(encoder, optimizer, batches, len(train), recipe, **options):
        correct = None
        if epoch.epoch % output.eval_every == 0 or epoch.epoch == recipe.epochs:
            correct = supervised.count_correct(judged, scored, len(evaluated), autocast=autocast)
        log.add(epoch, correct, len(evaluated))
        if output.resume and output.folder is not None:
            stored: dict[str, Any] = {name: part.state_dict() for name, part in learning.items()}
            stored["run"] = {"identity": identity, "records": log.records}
            checkpoints.save(stored, output.folder / f"checkpoint-{epoch.epoch - 1}.pth", keep=1)
    facts = described(judged, classes, data.crop_pct)
    log.close({"model": judged.state_dict(), "epoch": recipe.epochs, "classifier": facts})


def _identity(source: Source, data: Labelled, recipe: Recipe, tuning: Tuning, augmentation: Augmentation, images: int) -> Any:
    """Return the settings that must not change when a run is resumed."""
    given = asdict(source) | asdict(data) | asdict(recipe) | asdict(tuning) | asdict(augmentation) | {"number of images": images}
    del given["device"]
    return {name: value if isinstance(value, int | float | None) else str(value) for name, value in given.items()}


def _resumed(output: Output, learning: Mapping[str, Any], identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Load the newest checkpoint into `learning` and return the records of the finished epochs."""
    there = checkpoints.find(output.folder) if output.resume and output.folder is not None else []
    if not there:
        return []
    entries = checkpoints.read(there[-1])
    checkpoints.must_agree(there[-1], entries["run"].get("identity", {}), identity)
    for name, part in learning.items():
        part.load_state_dict(entries[name])
    return entries["run"]["records"]
