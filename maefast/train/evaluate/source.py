"""The checkpoint and the images of an evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import checkpoint
from ...encoder import VisionTransformer
from ...model import MAE
from ..data.labelled import Chosen, Labelled
from ..device import find_device
from ..errors import UserError, user_errors
from ..variants import variant_with
from .features import fitted, load_encoder


@dataclass(frozen=True)
class Source:
    """A checkpoint, and values that override it or that it may lack; None: no override."""

    checkpoint: Path
    key: str | None = None  # chooses one of several models
    input_size: int | tuple[int, int] | None = None
    num_heads: int | None = None
    decoder_num_heads: int | None = None  # only for reconstruct
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    nodata: float | None = None  # the missing value of float arrays
    random_init: bool = False
    device: str = "cpu"
    seed: int = 0

    def overrides(self) -> dict[str, Any]:
        names = ("key", "num_heads", "decoder_num_heads", "mean", "std")
        given = {"img_size": self.input_size} | {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def encoder(self, **options: Any) -> VisionTransformer:
        """Return the encoder on its device, and seed torch's generator for all later draws."""
        torch.manual_seed(self.seed)
        encoder = load_encoder(self.checkpoint, random_init=self.random_init, **self.overrides(), **options)
        return encoder.to(find_device(self.device))


def load_mae(source: Source) -> MAE:
    """Load the whole model of a checkpoint. Raises UserError if it has no decoder."""
    torch.manual_seed(source.seed)
    with user_errors(checkpoint.CheckpointError, checkpoint.MissingPackageError, OSError, ValueError):
        model, report = checkpoint.from_pretrained(MAE, source.checkpoint, **source.overrides())
        if (cls := variant_with(report.ignored)) is not MAE:
            model, report = checkpoint.from_pretrained(cls, source.checkpoint, **source.overrides())
    if not report.has_decoder:
        raise UserError(f"CHECKPOINT must have a decoder for reconstruct; {source.checkpoint} has none")
    return model


def prepared(source: Source, data: Labelled, **options: Any) -> tuple[VisionTransformer, Chosen, Any]:
    """Return the encoder, the images to learn from and the images to score."""
    encoder = source.encoder(**options)
    train, taken, evaluated = data.opened(encoder.patch_embed.proj.in_channels, source.seed)
    train, evaluated = (fitted(encoder, images, source.nodata) for images in (train, evaluated))
    return encoder, Chosen(train, taken), evaluated
