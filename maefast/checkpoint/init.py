"""Training that starts from a checkpoint of other images, another decoder or another head."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .architecture import is_decoder, misfit
from .files import CheckpointError
from .load import VARIANT, Checkpoint, LoadReport, check_heads, check_model, put, read, refit, stored_positions
from .positions import Grid
from .statistics import warn_of_model
from .target import warn_of_target


def init_from(model: nn.Module, path: str | Path, *, key: str | None = None, stored_grid: Grid | None = None) -> LoadReport:
    """Start an MAE from the encoder of a checkpoint, and from its decoder if it fits.

    key, stored_grid    as in `load`

    Positions are fitted as in `load`. For another number of channels, patch embedding and
    predictions are repeated or averaged, so that an image of equal channels keeps its tokens. A
    head, a `fc_norm` and a decoder of other sizes are left out, and reported. Raises as `load`; the
    model is then unchanged, bit for bit.
    """
    check_model(model)
    ours = model.state_dict()
    if not any(map(is_decoder, ours)):
        raise TypeError(f"model must be an MAE, with a decoder; it is a {type(model).__name__}, which load fills")
    checkpoint = read(path, key)
    left_out, warnings = _without_classifier(checkpoint)
    checkpoint = checkpoint.without(left_out)
    grid = stored_positions(model, checkpoint, stored_grid)
    checkpoint, adapted = _with_channels(model, checkpoint)
    tensors, positions = refit(model, checkpoint, grid)
    checkpoint = replace(checkpoint, tensors=tensors)
    decoder, why = _unfit_decoder(model, checkpoint)
    if why:
        left_out, warnings, checkpoint = left_out + decoder, [*warnings, why], checkpoint.without(decoder)
        adapted, positions = ([c for c in changes if c.split()[0] not in decoder] for changes in (adapted, positions))
    variant = {name: t for name, t in checkpoint.variant.items() if name in ours and t.shape == ours[name].shape}
    checkpoint = replace(checkpoint, variant={name: t for name, t in checkpoint.variant.items() if name not in variant})
    theirs = checkpoint.tensors | variant
    strange, missing = [name for name in theirs if name not in ours], [name for name in ours if name not in theirs]
    lacking = [name for name in missing if not _keeps_own(name, left_out)]
    if strange or lacking:
        raise CheckpointError(f"{checkpoint.path} does not fit {type(model).__name__}: {misfit(strange, lacking)}")
    check_heads(model, checkpoint)
    put(model, checkpoint, theirs)
    if checkpoint.has_decoder:
        warnings += checkpoint.warn_of_variant() + warn_of_target(checkpoint, bool(model.norm_pix_loss))
    elif not why:
        warnings.append("the checkpoint holds no decoder; the model keeps its own")
    warnings += warn_of_model(model, checkpoint.statistics)
    return checkpoint.report(missing, left_out, positions, adapted, warnings)


def _keeps_own(name: str, left_out: list[str]) -> bool:
    """Return whether a tensor that the checkpoint lacks may keep its initial values."""
    return is_decoder(name) or name.startswith(VARIANT) or (name.startswith("norm.") and f"fc_{name}" in left_out)


def _without_classifier(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the names of a classifier's head and fc_norm, and warnings that they are left out."""
    pooled = [name for name in checkpoint.tensors if name.startswith("fc_norm.")]
    warnings = checkpoint.warn_of_head("training starts without it")
    if pooled and "norm.weight" not in checkpoint.tensors:
        warnings.append("the checkpoint has fc_norm, for pooled tokens, in place of norm; the model keeps its own norm")
    return checkpoint.head + pooled, warnings


def _with_channels(model: nn.Module, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint fitted to the model's channels, and what was done."""
    ours, theirs = model.state_dict(), dict(checkpoint.tensors)
    embedding = theirs["patch_embed.proj.weight"]  # [D, C, ph, pw], as find_grid has checked
    channels, wanted = embedding.shape[1], ours["patch_embed.proj.weight"].shape[1]
    if channels == wanted:
        return checkpoint, []
    source = torch.arange(wanted) % channels
    if wanted > channels:
        copies = torch.bincount(source, minlength=channels)
        spread = embedding[:, source] / copies[source, None, None].to(embedding.dtype)
        change = f"repeated for {wanted} channels and divided by the number of copies; the file has {channels}"
    else:
        spread = embedding.mean(dim=1, keepdim=True).repeat(1, wanted, 1, 1) * (channels / wanted)
        change = f"averaged over the {channels} channels of the file for {wanted}, times {channels}/{wanted}"
    theirs["patch_embed.proj.weight"] = spread
    adapted = [f"patch_embed.proj.weight {change}"]
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        if name in theirs and theirs[name].dim() and len(theirs[name]) == embedding[0].numel():
            # [ph*pw, C, ...], as the values of a patch lie
            by_channel = theirs[name].unflatten(0, (-1, channels))
            if wanted < channels:
                by_channel = by_channel.mean(dim=1, keepdim=True)
            theirs[name] = by_channel[:, source % by_channel.shape[1]].flatten(0, 1)
            how = "repeated" if wanted > channels else f"averaged over the {channels} channels of the file"
            adapted.append(f"{name} {how} for {wanted} channels")
    return replace(checkpoint, tensors=theirs), adapted


def _unfit_decoder(model: nn.Module, checkpoint: Checkpoint) -> tuple[list[str], str]:
    """Return the names of the checkpoint's decoder, and a warning if it does not fit the model."""
    ours = {name: tensor for name, tensor in model.state_dict().items() if is_decoder(name)}
    theirs = {name: tensor for name, tensor in checkpoint.tensors.items() if is_decoder(name)}
    if not theirs:
        return [], ""
    strange, lacking = [name for name in theirs if name not in ours], [name for name in ours if name not in theirs]
    why = misfit(strange, lacking) if strange or lacking else _other_shape(ours, theirs)
    try:
        check_heads(model, checkpoint, stacks=("decoder_blocks",))
    except CheckpointError as error:
        why = why or str(error)
    return list(theirs), f"the decoder of the checkpoint is left out, and the model keeps its own: {why}" if why else ""


def _other_shape(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            return f"{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(ours[name].shape)} in the model"
    return ""
