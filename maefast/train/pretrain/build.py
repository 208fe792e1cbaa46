"""What a pre-training needs before it starts: the device and the model that the options ask for."""

from typing import Any

import torch

from ... import models_mae
from ...model import MAE
from ..data.open import open_images
from ..data.sources import ImageDataset
from ..errors import UserError
from ..masks import check_sampler
from ..variants import variant
from .options import Options

SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")


def training_images(options: Options) -> ImageDataset:
    """The images to train on. Raises UserError."""
    return open_images(options.data_path, "train", options.in_chans)


def build_model(options: Options, channels: int) -> MAE:
    """A fresh model, its weights from the seed. Raises UserError for sizes or a mask ratio that do not fit together."""
    given: dict[str, Any] = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    half = None if channels == 3 else (0.5,) * channels
    given |= {"mean": options.mean or half, "std": options.std or half, "norm_pix_loss": options.norm_pix_loss}
    given["model_class"] = variant(options.mask_tokens_in_encoder, options.target)
    torch.manual_seed(options.seed)
    try:
        model: MAE = getattr(models_mae, options.model)(img_size=options.input_size, in_chans=channels, **given)
    except ValueError as error:
        raise UserError(f"--model {options.model} cannot be built with --input_size {options.input_size}: {error}") from error
    patches = model.patch_embed.num_patches
    kept = int(patches * (1 - options.mask_ratio))
    if not 0 < kept < patches:
        what = f"{options.mask_ratio} keeps {kept} of {patches}"
        raise UserError(f"--mask_ratio must keep at least one patch and remove at least one; {what}")
    try:
        check_sampler(options.sampler, model.patch_embed.grid_size, kept)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return model
