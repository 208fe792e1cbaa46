"""The names of tensors in each layout, and the official ones, also timm's and maefast's."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .files import CheckpointError, listed

QKV = "attn.qkv"


@dataclass(frozen=True)
class Names:
    """A table from the names of a layout to official ones."""

    blocks: Mapping[str, str]  # prefix of a block's number -> blocks or decoder_blocks
    modules: Mapping[str, str]  # module of a block -> official module
    outside: Mapping[str, str]  # module or parameter outside of the blocks -> official one
    parts: Mapping[str, int] = field(default_factory=dict)  # module of a block -> third of qkv

    @cached_property
    def _block(self) -> re.Pattern[str]:
        return re.compile(rf"({'|'.join(map(re.escape, self.blocks))})([0-9]+)\.(.+)(?:\.|(?<=in_proj)_)(weight|bias)")

    def official(self, name: str) -> tuple[str, int | None] | None:
        """Return a tensor's official name and which third of it q, k or v is; None if unknown."""
        if found := self._block.fullmatch(name):
            before, index, module, kind = found.groups()
            block = f"{self.blocks[before]}.{index}"
            if module in self.parts:
                return f"{block}.{QKV}.{kind}", self.parts[module]
            return (f"{block}.{self.modules[module]}.{kind}", None) if module in self.modules else None
        module, kind = _split(name)
        return (self.outside[module] + kind, None) if module in self.outside else None


@dataclass(frozen=True)
class Layout:
    """The names of a layout, relative to the prefixes of encoder and decoder."""

    name: str
    anchor: str  # the patch embedding's weight, by which an encoder is found
    encoder: Names
    decoder: Names


_OFFICIAL_MODULES = {name: name for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
_DECODER = {name: name for name in ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")}
_OFFICIAL_DECODER = Names({"decoder_blocks.": "decoder_blocks"}, _OFFICIAL_MODULES, _DECODER)
_OFFICIAL = Layout(
    "official",
    "patch_embed.proj.weight",
    Names(
        {"blocks.": "blocks"},
        _OFFICIAL_MODULES,
        {name: name for name in ("cls_token", "pos_embed", "patch_embed.proj", "norm", "fc_norm", "head")},
    ),
    _OFFICIAL_DECODER,
)

# transformers' published spelling, then version 5's, of modules and of the decoder in saved files
_THEIR_BLOCKS = {"blocks": ("encoder.layer", "layers"), "decoder_blocks": ("decoder_layers", "decoder_encoder.layer")}
_THEIR_PARTS = (("attention.attention.query", "attention.q_proj"),
                ("attention.attention.key", "attention.k_proj"),
                ("attention.attention.value", "attention.v_proj"))  # fmt: skip
_THEIR_MODULES = {
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
}
_THEIR_ENCODER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}


def _theirs(blocks: str, outside: Mapping[str, str]) -> Names:
    return Names(
        {f"{theirs}.": blocks for theirs in _THEIR_BLOCKS[blocks]},
        {theirs: ours for ours, spellings in _THEIR_MODULES.items() for theirs in spellings},
        outside,
        {theirs: part for part, spellings in enumerate(_THEIR_PARTS) for theirs in spellings},
    )


_TRANSFORMERS = Layout(
    "transformers",
    "embeddings.patch_embeddings.projection.weight",
    _theirs("blocks", _THEIR_ENCODER),
    _theirs("decoder_blocks", _DECODER),
)

_MM_MODULES = {
    "ln1": "norm1",
    "attn.qkv": QKV,
    "attn.proj": "attn.proj",
    "ln2": "norm2",
    "ffn.layers.0.0": "mlp.fc1",
    "ffn.layers.1": "mlp.fc2",
}
_MMPRETRAIN = Layout(  # mmselfsup's, too
    "mmpretrain",
    "patch_embed.projection.weight",
    Names(
        {"layers.": "blocks"},
        _MM_MODULES,
        {
            "cls_token": "cls_token",
            "pos_embed": "pos_embed",
            "patch_embed.projection": "patch_embed.proj",
            "ln1": "norm",
            "ln2": "fc_norm",
        },
    ),
    Names({"decoder_blocks.": "decoder_blocks"}, _MM_MODULES, _DECODER | {"ln1": "decoder_norm"}),
)

_TORCHVISION_MODULES = {
    "ln_1": "norm1",
    "self_attention.in_proj": QKV,
    "self_attention.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.linear_1": "mlp.fc1",
    "mlp.3": "mlp.fc2",
    "mlp.linear_2": "mlp.fc2",
}
_TORCHVISION = Layout(  # and lightly's decoder beside it
    "torchvision",
    "conv_proj.weight",
    Names(
        {"encoder.layers.encoder_layer_": "blocks"},
        _TORCHVISION_MODULES,
        {
            "class_token": "cls_token",
            "encoder.pos_embedding": "pos_embed",
            "conv_proj": "patch_embed.proj",
            "encoder.ln": "norm",
            "heads": "head",
            "heads.head": "head",
        },
    ),
    Names(
        {"layers.encoder_layer_": "decoder_blocks"},
        _TORCHVISION_MODULES,
        {
            "mask_token": "mask_token",
            "pos_embedding": "decoder_pos_embed",
            "decoder_embed": "decoder_embed",
            "ln": "decoder_norm",
            "prediction_head": "decoder_pred",
        },
    ),
)

KNOWN = (_OFFICIAL, _TRANSFORMERS, _MMPRETRAIN, _TORCHVISION)
DECODER_ANCHOR = "decoder_embed.weight"  # of each of them


class OfficialNames:
    """Tensors gathered under their official names; q, k and v are joined."""

    def __init__(self, path: Path, layout: Layout):
        self.path, self.layout = path, layout
        self.named: dict[str, Tensor] = {}
        self._thirds: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def add(self, name: str, part: int | None, tensor: Tensor) -> None:
        """Add a tensor. Raises CheckpointError for a name that is taken."""
        taken: dict[str, Tensor] | dict[int, Tensor] = self.named if part is None else self._thirds[name]
        if (name if part is None else part) in taken:
            raise CheckpointError(f"{self.path} holds {name} twice, under two of the spellings of {self.layout.name}")
        taken[name if part is None else part] = tensor  # type: ignore[index]

    def joined(self) -> dict[str, Tensor]:
        """Join q, k and v. Raises CheckpointError unless they are complete and fit each other."""
        for name, parts in self._thirds.items():
            found = [parts[part] for part in sorted(parts)]
            if len(found) < len(_THEIR_PARTS) or len({(part.shape, part.dtype) for part in found}) > 1:
                spellings = [_THEIR_PARTS[part][0].split(".")[-1] for part in sorted(parts)]
                shapes = [f"{spelling} {tuple(tensor.shape)}" for spelling, tensor in zip(spellings, found, strict=True)]
                raise CheckpointError(
                    f"{self.path} must hold query, key and value of one shape and dtype for {name}; it has {listed(shapes)}"
                )
            self.named[name] = torch.cat(found)
        return self.named


def _split(name: str) -> tuple[str, str]:
    """Return a module's name and ".weight" or ".bias", or a parameter's name and nothing."""
    module, _, kind = name.rpartition(".")
    return (module, f".{kind}") if kind in ("weight", "bias") else (name, "")


_OUR_BLOCK = re.compile(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)")
_THEIR_PREFIX = {"blocks": "vit.", "decoder_blocks": "decoder."}
_THEIR_OUTSIDE = {ours: f"vit.{theirs}" for theirs, ours in _THEIR_ENCODER.items()} | {n: f"decoder.{n}" for n in _DECODER}


def transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of official names by transformers' published names, which its versions 4 and 5 read;
    q, k, v are views of qkv."""
    return dict(_transformers_names(tensors))


def _transformers_names(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if found := _OUR_BLOCK.fullmatch(name):
            blocks, index, module, kind = found.groups()
            block = f"{_THEIR_PREFIX[blocks]}{_THEIR_BLOCKS[blocks][0]}.{index}"
            if module == QKV:
                thirds = zip(_THEIR_PARTS, tensor.chunk(3), strict=True)
                yield from ((f"{block}.{spellings[0]}.{kind}", third) for spellings, third in thirds)
            else:
                yield f"{block}.{_THEIR_MODULES[module][0]}.{kind}", tensor
        else:
            module, kind = _split(name)
            yield _THEIR_OUTSIDE[module] + kind, tensor
