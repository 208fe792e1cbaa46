"""Checkpoints of fine-tuned classifiers, which also hold what is needed to build the model."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ...checkpoint import CheckpointError
from ...checkpoint.architecture import Architecture, Facts, encoder_arguments, infer
from ...checkpoint.candidates import read
from ...encoder import VisionTransformer
from ..errors import UserError, user_errors


class Classifier(NamedTuple):
    model: VisionTransformer
    classes: tuple[str, ...]
    crop_pct: float | None  # per side of the largest centred box, as it was scored; None: crops.usual_scale


def described(model: VisionTransformer, classes: Sequence[str], crop_pct: float | None) -> dict[str, Any]:
    """Return what `load_classifier` needs of `model` beside its weights."""
    first: Any = model.blocks[0]
    mean, std = (None if buffer is None else buffer.tolist() for buffer in (model.mean, model.std))
    facts = Facts(first.attn.num_heads, 1, model.patch_embed.img_size, False, first.norm1.eps, mean=mean, std=std)
    architecture = infer(model.state_dict(), facts, Path("the model"), model.patch_embed.grid_size)
    ours = {name: value for name, value in asdict(architecture).items() if not name.startswith("decoder_")}
    return {"architecture": ours, "global_pool": model.global_pool, "classes": list(classes), "crop_pct": crop_pct}


def load_classifier(path: Path) -> Classifier:
    """Load a classifier of `maefast finetune` or `partial`, in eval mode, on the CPU. Raises
    UserError for any other file."""
    with user_errors(CheckpointError, OSError):
        contents = read(path)
    facts = contents.ignored.get("classifier")
    if not isinstance(facts, dict):
        raise UserError(f"CHECKPOINT must be a classifier that maefast finetune or partial wrote; {path} is another file")
    decoder: dict[str, Any] = {"decoder_embed_dim": 1, "decoder_depth": 0, "decoder_num_heads": 1}
    ours = encoder_arguments(Architecture(**decoder, **facts["architecture"]).arguments())
    model = VisionTransformer(**ours, num_classes=len(facts["classes"]), global_pool=facts["global_pool"])
    model.load_state_dict(contents.tensors)
    return Classifier(model.eval(), tuple(facts["classes"]), facts["crop_pct"])
