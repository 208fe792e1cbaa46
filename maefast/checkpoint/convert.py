"""Conversion from any known layout to one that the official code, transformers or timm reads with
nothing missing or unexpected."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import replace_file
from . import files, statistics
from .architecture import OFFICIAL_EPS, THEIR_MODEL_TYPE, Architecture, find_grid, infer, is_decoder
from .files import CheckpointError
from .layouts import transformers_names
from .load import Checkpoint, LoadReport, read
from .positions import Grid
from .target import unknown_target

# and the suffixes of their files
LAYOUTS = {"official": files.PICKLED, "transformers": (), "timm": files.SUFFIXES}


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    key: str | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    norm_pix_loss: bool | None = None,
    stored_grid: Grid | None = None,
) -> LoadReport:
    """Write the checkpoint `source`, of any known layout, to `out`; every tensor keeps its dtype
    and its bits.

    to                              "official": a file `{"model": state_dict}`; "transformers": a
                                    folder with config.json, model.safetensors and, where mean and
                                    std are known, preprocessor_config.json; "timm": the encoder
                                    alone, as .safetensors or a pickled state_dict
    key                             which weights to take where the checkpoint holds several, as in
                                    `load`
    num_heads, decoder_num_heads    for transformers' config, if the checkpoint does not store them
                                    and the width does not imply them
    norm_pix_loss                   the target, if the checkpoint does not store it; False by
                                    default
    stored_grid                     (rows, columns) of the stored positions, as in `load`
    Returns a report; its `unexpected` are the tensors that the layout has no place for.
    Raises ValueError for an unknown `to` or suffix, FileExistsError if `out` exists,
    FileNotFoundError, CheckpointError (a ValueError), and RuntimeError if safetensors is needed and
    not installed; `out` is then not created.
    """
    out = Path(out)
    _check_output(out, to)
    checkpoint = read(source, key)
    facts = checkpoint.facts
    facts = replace(
        facts,
        num_heads=facts.num_heads if num_heads is None else num_heads,
        decoder_num_heads=facts.decoder_num_heads if decoder_num_heads is None else decoder_num_heads,
        norm_pix_loss=facts.norm_pix_loss if norm_pix_loss is None else norm_pix_loss,
    )
    checkpoint = replace(checkpoint, facts=facts)
    about = (checkpoint.tensors, facts, checkpoint.path)
    architecture = infer(*about, find_grid(*about, stored_grid))
    left_out, warnings = checkpoint.head, checkpoint.warn_of_head("what is written has none")
    checkpoint = checkpoint.without(left_out)
    tensors = architecture.checked(checkpoint.tensors, checkpoint.path)
    if to == "timm":
        left_out += [name for name in tensors if is_decoder(name)]
        tensors = {name: tensor for name, tensor in tensors.items() if not is_decoder(name)}
    else:
        warnings += checkpoint.warn_of_variant()
    if to == "transformers":
        _write_transformers(tensors, architecture, facts.mask_ratio, checkpoint, out)
        if facts.norm_pix_loss is None and checkpoint.has_decoder:
            warnings.append(unknown_target("norm_pix_loss is written as false"))
    else:
        if out.suffix == ".safetensors":
            files.write_safetensors(tensors, out)
        else:
            files.write_pickled({"model": tensors} if to == "official" else tensors, out)
        if architecture.layer_norm_eps != OFFICIAL_EPS:
            eps = architecture.layer_norm_eps
            warnings.append(f"the layout has no place for the LayerNorm eps, {eps}; its models take {OFFICIAL_EPS}")
    warnings += statistics.warn_of_layout(to, checkpoint.statistics)
    return checkpoint.report(unexpected=left_out, warnings=warnings)


def _check_output(out: Path, to: str) -> None:
    if to not in LAYOUTS:
        raise CheckpointError(f"to must be one of {', '.join(LAYOUTS)}; it is {to!r}")
    if out.suffix not in LAYOUTS[to] and LAYOUTS[to]:
        raise CheckpointError(f"out must end in {' or '.join(LAYOUTS[to])} for the layout {to}; it is {out}")
    if not LAYOUTS[to] and out.suffix in files.SUFFIXES:
        raise CheckpointError(f"out must be a folder for the layout {to}; it is {out}")
    if os.path.lexists(out):
        raise FileExistsError(f"out must not exist yet; {out} does")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists; {out.parent} does not")


def _write_transformers(
    tensors: Mapping[str, Tensor], architecture: Architecture, mask_ratio: float | None, checkpoint: Checkpoint, out: Path
) -> None:
    architecture.require_heads(checkpoint.path)
    for name in ("img_size", "patch_size"):
        height, width = getattr(architecture, name)
        if height != width:
            raise CheckpointError(f"{name} of {checkpoint.path} is {height} x {width}; transformers' ViTMAE takes only squares")
    config = _transformers_config(architecture, checkpoint.has_decoder, mask_ratio)
    config["torch_dtype"] = str(tensors["cls_token"].dtype).removeprefix("torch.")
    with replace_file(out) as folder:
        files.write_safetensors(transformers_names(tensors), folder / files.WEIGHTS)
        files.write_json(config, folder / files.CONFIG)
        if (told := checkpoint.statistics) is not None and statistics.are_of_pixels(*told):
            files.write_json(statistics.preprocessor(*told, architecture.img_size), folder / files.PREPROCESSOR)


def _transformers_config(architecture: Architecture, decoder: bool, mask_ratio: float | None) -> dict[str, Any]:
    """Return a complete ViTMAEConfig, as save_pretrained writes it."""
    return {
        "architectures": ["ViTMAEForPreTraining" if decoder else "ViTMAEModel"],
        "model_type": THEIR_MODEL_TYPE,
        "hidden_size": architecture.embed_dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "intermediate_size": int(architecture.embed_dim * architecture.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": architecture.layer_norm_eps,
        "image_size": architecture.img_size[0],
        "patch_size": architecture.patch_size[0],
        "num_channels": architecture.in_chans,
        "qkv_bias": True,
        "decoder_hidden_size": architecture.decoder_embed_dim,
        "decoder_num_hidden_layers": architecture.decoder_depth,
        "decoder_num_attention_heads": architecture.decoder_num_heads,
        "decoder_intermediate_size": int(architecture.decoder_embed_dim * architecture.mlp_ratio),
        "mask_ratio": 0.75 if mask_ratio is None else mask_ratio,
        "norm_pix_loss": architecture.norm_pix_loss,
    }
