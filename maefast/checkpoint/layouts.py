"""The names that tensors have: official (also timm's and maefast's own) and transformers', in both directions, bit for bit."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .files import CheckpointError, Contents, listed

TRANSFORMERS_KEY = "embeddings.patch_embeddings.projection.weight"
OFFICIAL_KEY = "patch_embed.proj.weight"

# transformers' published spelling first, then those of version 5: in its modules, and for the decoder in the files it saves.
_BLOCKS = {"blocks": ("vit.encoder.layer", "vit.layers"),
           "decoder_blocks": ("decoder.decoder_layers", "decoder.decoder_encoder.layer")}  # fmt: skip
_PARTS = (("attention.attention.query", "attention.q_proj"),
          ("attention.attention.key", "attention.k_proj"),
          ("attention.attention.value", "attention.v_proj"))  # fmt: skip
_MODULES = {
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
}
_OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
} | {name: f"decoder.{name}" for name in ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")}

_BLOCK_OF = {theirs: ours for ours, spellings in _BLOCKS.items() for theirs in spellings}
_PART_OF = {theirs: part for part, spellings in enumerate(_PARTS) for theirs in spellings}
_MODULE_OF = {theirs: ours for ours, spellings in _MODULES.items() for theirs in spellings}
_OUTSIDE_OF = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_THEIR_BLOCK = re.compile(rf"({'|'.join(map(re.escape, _BLOCK_OF))})\.(\d+)\.(.+)\.(weight|bias)")
_OUR_BLOCK = re.compile(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)")
_ENCODER_ALONE = ("embeddings.", "encoder.", "layers.", "layernorm.")  # ViTMAEModel's files, without the prefix vit


def official_names(contents: Contents) -> tuple[str, dict[str, Tensor]]:
    """The layout, "official" or "transformers", and the tensors by their official names; q, k and v are joined.

    A name that transformers' layout does not have stays as it is. Raises CheckpointError for another architecture.
    """
    tensors = contents.tensors
    if OFFICIAL_KEY in tensors:
        return "official", tensors
    if not any(name in tensors for name in (TRANSFORMERS_KEY, f"vit.{TRANSFORMERS_KEY}")):
        raise CheckpointError(
            f"{contents.path} holds no Masked Autoencoder: it has neither {OFFICIAL_KEY} (official, timm) nor "
            f"vit.{TRANSFORMERS_KEY} (transformers), but {listed(list(tensors))}"
        )
    named: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        ours, part = _official_name(f"vit.{name}" if name.startswith(_ENCODER_ALONE) else name)
        taken = named if part is None else thirds[ours]
        if (ours if part is None else part) in taken:
            raise CheckpointError(f"{contents.path} holds {ours} twice, under two of transformers' spellings")
        if part is None:
            named[ours] = tensor
        else:
            thirds[ours][part] = tensor
    for name, parts in thirds.items():
        named[name] = _joined(contents, name, parts)
    return "transformers", named


def _official_name(name: str) -> tuple[str, int | None]:
    """The official name of one of transformers', and which third of it q, k or v is."""
    if found := _THEIR_BLOCK.fullmatch(name):
        blocks, index, module, kind = found.groups()
        if module in _PART_OF:
            return f"{_BLOCK_OF[blocks]}.{index}.attn.qkv.{kind}", _PART_OF[module]
        if module in _MODULE_OF:
            return f"{_BLOCK_OF[blocks]}.{index}.{_MODULE_OF[module]}.{kind}", None
    module, kind = _split(name)
    return (_OUTSIDE_OF[module] + kind, None) if module in _OUTSIDE_OF else (name, None)


def _split(name: str) -> tuple[str, str]:
    """A module's name and ".weight" or ".bias", or a parameter's name and nothing."""
    module, _, kind = name.rpartition(".")
    return (module, f".{kind}") if kind in ("weight", "bias") else (name, "")


def _joined(contents: Contents, name: str, parts: Mapping[int, Tensor]) -> Tensor:
    found = [parts[part] for part in sorted(parts)]
    if len(found) < len(_PARTS) or len({(part.shape, part.dtype) for part in found}) > 1:
        shapes = listed([f"{_PARTS[part][0].split('.')[-1]} {tuple(tensor.shape)}" for part, tensor in sorted(parts.items())])
        raise CheckpointError(
            f"{contents.path} must hold query, key and value of one shape and dtype for {name}; it has {shapes}"
        )
    return torch.cat(found)


def transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of official names by transformers' published names, which its versions 4 and 5 read; q, k, v are views of qkv."""
    return dict(_transformers_names(tensors))


def _transformers_names(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if found := _OUR_BLOCK.fullmatch(name):
            blocks, index, module, kind = found.groups()
            block = f"{_BLOCKS[blocks][0]}.{index}"
            if module == "attn.qkv":
                yield from ((f"{block}.{part[0]}.{kind}", third) for part, third in zip(_PARTS, tensor.chunk(3), strict=True))
            else:
                yield f"{block}.{_MODULES[module][0]}.{kind}", tensor
        else:
            module, kind = _split(name)
            yield _OUTSIDE[module] + kind, tensor
