"""Preparation of a pre-training: checks of the options, the images, the model."""

from typing import Any

import torch

from ... import checkpoint, models_mae
from ...model import MAE
from ...ops import len_keep
from .. import step
from ..data.open import open_images
from ..data.sources import ImageDataset
from ..errors import UserError, user_errors
from ..group import Group
from ..masks import check_sampler
from ..variants import variant
from .options import Options

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")


def training_images(options: Options) -> ImageDataset:
    """Open the images to train on. Raises UserError."""
    return open_images(options.data_path, "train", options.in_chans, options.output_dir)


def check_options(options: Options, group: Group, batch: int, images: int) -> None:
    """Raise UserError unless options, processes and steps of `batch` images fit each other."""
    if images < batch:
        needed = f"--batch_size x --accum_iter{' x processes' if group.world_size > 1 else ''} = {batch} images"
        raise UserError(f"--data_path must hold at least {needed}; {options.data_path} holds {images}")
    if options.start_epoch >= options.epochs:
        raise UserError(f"--start_epoch must be less than --epochs, {options.epochs}; it is {options.start_epoch}")
    if options.fsdp and group.local_rank is None:
        raise UserError("--fsdp must run in several processes (torchrun --nproc_per_node N); there is only this process")
    for name in ("reference", "graph"):
        if getattr(options, name) and group.local_rank is not None:
            raise UserError(f"--{name} must run in one process, without a launcher; there are {group.world_size}")


def find_autocast(options: Options, device: torch.device) -> torch.dtype | None:
    """Return the dtype of --amp, None for off. Raises UserError if the device cannot run it."""
    amp = options.amp or ("bf16" if device.type == "cuda" else "off")
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 must run on a GPU; the device is {device}")
    return DTYPES[amp]


def check_graph(device: torch.device) -> None:
    """Raise UserError unless steps on the device can be a CUDA graph."""
    try:
        step.require_cuda(device)
    except RuntimeError as error:
        raise UserError(f"--graph must run on a GPU; the device is {device}") from error


def init_model(model: MAE, options: Options) -> checkpoint.LoadReport:
    """Load the weights of --init into the model. Raises UserError if they do not fit."""
    assert options.init is not None
    expected = (checkpoint.CheckpointError, checkpoint.MissingPackageError, OSError)
    with user_errors(*expected, prefix="--init must be a checkpoint that fits the model: "):
        return model.init_from(options.init, key=options.key)


def check_values(options: Options, images: Any) -> None:
    """Raise UserError unless the options suit the dtype of the images."""
    if images.dtype == torch.uint8:
        return
    if options.mean is None or options.std is None:
        raise UserError("--mean and --std must be given for float images, in their own unit; --data_path holds floats")
    if options.augment == "rrc+jitter":
        raise UserError("--augment must be none, crop or rrc for float images, which have no colours; it is rrc+jitter")


def build_model(options: Options, channels: int) -> MAE:
    """Build a model with weights drawn from the seed. Raises UserError if options do not fit."""
    given: dict[str, Any] = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    half = None if channels == 3 else (0.5,) * channels
    given |= {"mean": options.mean or half, "std": options.std or half, "norm_pix_loss": options.norm_pix_loss}
    given["model_class"] = variant(options.mask_tokens_in_encoder, options.target)
    torch.manual_seed(options.seed)
    size = options.input_size if isinstance(options.input_size, int) else " ".join(map(str, options.input_size))
    with user_errors(ValueError, prefix=f"--model {options.model} cannot be built with --input_size {size}: "):
        model: MAE = getattr(models_mae, options.model)(img_size=options.input_size, in_chans=channels, **given)
    patches = model.patch_embed.num_patches
    with user_errors(ValueError, prefix="--"):
        kept = len_keep(patches, options.mask_ratio)
    if not 0 < kept < patches:
        what = f"{options.mask_ratio} keeps {kept} of {patches}"
        raise UserError(f"--mask_ratio must keep at least one patch and remove at least one; {what}")
    with user_errors(ValueError, prefix="--"):
        check_sampler(options.sampler, model.patch_embed.grid_size, kept)
    return model
