"""Weights in a checkpoint, found by their names in any entry, prefix and layout."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files
from .files import CheckpointError, Contents, listed
from .layouts import DECODER_ANCHOR, KNOWN, Layout, OfficialNames

# parts that DDP and AveragedModel, torch.compile, FSDP, checkpointing and Lightning add to names
WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"))
DEPTH = 4  # of entries within entries
TOP = "."  # the key of weights that lie at the top of a file, without a prefix

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """The weights of one model in a checkpoint, by their official names."""

    path: Path
    source: str  # where they were, in words
    layout: str
    tensors: dict[str, Tensor]
    beside: tuple[str, ...]  # tensors of the same entry that are not the model's
    config: Mapping[str, Any]  # config.json, or the entry `config` of the file
    args: Mapping[str, Any]  # of the training script
    ignored: Mapping[str, Any]  # the other entries, by their names
    preprocessor: Mapping[str, Any]  # preprocessor_config.json


@dataclass(frozen=True)
class Candidate:
    """An encoder among the tensors `state` of an entry, and the nearest decoder."""

    path: Path
    layout: Layout
    entry: tuple[str, ...]  # names of the entries that lead to `state`
    state: State
    prefix: str  # of the encoder's names
    decoder: str | None  # prefix of the decoder's names
    others: tuple[str, ...]  # prefixes of other encoders in `state`

    @property
    def key(self) -> str:
        return ".".join((*self.entry, *_parts(self.prefix))) or TOP

    @property
    def source(self) -> str:
        entry = ".".join(self.entry) or "the top of the file"
        prefixes = [prefix for prefix in dict.fromkeys((self.prefix, self.decoder)) if prefix]
        return f"{entry}, names after {' and '.join(prefixes)}" if prefixes else entry

    @cached_property
    def official(self) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Return the tensors by their official names, and the names of other tensors. Names of the
        model that the layout lacks stay as they are."""
        names, beside = OfficialNames(self.path, self.layout), list[str]()
        nested = self.decoder is not None and self.decoder != self.prefix and self.prefix.startswith(self.decoder)
        for name, tensor in self.state.items():
            inside, found = None, None
            if name.startswith(self.others):
                beside.append(name)
                continue
            if name.startswith(self.prefix):
                inside = name.removeprefix(self.prefix)
                found = self.layout.encoder.official(inside)
            if found is None and self.decoder is not None and name.startswith(self.decoder):
                local = name.removeprefix(self.decoder)
                found = self.layout.decoder.official(local)
                inside = local if inside is None and not nested else inside
            if found is not None:
                names.add(*found, tensor)
            elif inside is not None:
                names.add(inside, None, tensor)
            else:
                beside.append(name)
        if self.decoder is not None and "mask_token" not in names.named:
            self._take_mask_token(names, beside)
        return names.joined(), tuple(beside)

    def _take_mask_token(self, names: OfficialNames, beside: list[str]) -> None:
        """Take the decoder's mask token, which may be a parameter of the module around it."""
        shape = (1, 1, *self.state[f"{self.decoder}{DECODER_ANCHOR}"].shape[:1])
        tokens = [name for name in beside if _parts(name)[-1:] == ("mask_token",) and self.state[name].shape == shape]
        if len(tokens) == 1:
            names.add("mask_token", None, self.state[tokens[0]])
            beside.remove(tokens[0])


def read(path: str | Path, key: str | None = None) -> Weights:
    """Return the weights in a checkpoint of any known layout.

    key    which of several to take: the name of its entry, its prefix, or both, joined by dots
    Raises as files.read, and CheckpointError where there are none or several, which it lists.
    """
    contents = files.read(path)
    states = list(_states(contents))
    candidates = [candidate for entry, state in states for candidate in _candidates(contents.path, entry, state)]
    if not candidates:
        raise CheckpointError(_why_none(contents, states))
    candidate = _chosen(contents, candidates, key)
    _check(contents, candidate)
    tensors, beside = candidate.official
    entries = {str(name): entry for name, entry in contents.entries.items() if not isinstance(entry, Tensor)}
    args = entries.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    config, args = (entry if isinstance(entry, dict) else {} for entry in (contents.config or entries.get("config"), args))
    known = {"config", "args", *candidate.entry[:1]}
    ignored = {name: entry for name, entry in entries.items() if name not in known}
    source, layout = candidate.source, candidate.layout.name
    return Weights(contents.path, source, layout, tensors, beside, config, args, ignored, contents.preprocessor)


def _check(contents: Contents, candidate: Candidate) -> None:
    """Raise CheckpointError for tensors whose values are elsewhere, or are codes of values."""
    path = contents.path
    if empty := [name for name, tensor in candidate.official[0].items() if not tensor.numel()]:
        raise CheckpointError(
            f"{path} holds empty tensors, {listed(empty)}, as ZeRO-3 of DeepSpeed leaves them; join them with zero_to_fp32.py"
        )
    entry: Any = contents.entries
    for name in candidate.entry:
        entry = next(value for key, value in entry.items() if str(key) == name)
    if any("_packed_params" in str(name) for name in entry):
        raise CheckpointError(f"{path} holds quantised weights; save the state_dict of the model before quantisation")
    for name, tensor in candidate.official[0].items():
        if type(tensor).__name__ == "DTensor":
            raise files.sharded(path)
        if kind := _unusable(tensor):
            raise CheckpointError(f"{path} must hold dense tensors with values; it has {name}, {kind}")
        if tensor.numel() * tensor.itemsize > contents.size:
            raise CheckpointError(f"{path} is damaged: {name} of shape {tuple(tensor.shape)} is larger than the file")


def _unusable(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be read as plain numbers, or None."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"of layout {tensor.layout}"
    if tensor.is_quantized:
        return f"a quantised tensor of {tensor.dtype}"
    return "without values on the device meta" if tensor.device.type == "meta" else None


def official_names(tensors: State, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a model by official names. Raises CheckpointError if there are none."""
    candidates = _candidates(path, (), tensors)
    if not candidates:
        raise CheckpointError(_why_none(Contents(path, tensors, {}, 0), [((), tensors)]))
    return candidates[0].official[0]


def _states(contents: Contents) -> Iterator[tuple[tuple[str, ...], State]]:
    """Yield the names that lead to each dict of tensors in the file, and the dict."""
    seen: set[int] = set()

    def walk(entries: Mapping[Any, Any], entry: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], State]]:
        if id(entries) in seen:
            return
        seen.add(id(entries))
        if state := {name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)}:
            yield entry, state
        for name, value in entries.items():
            moments = "optim" in str(name).lower()  # which have the names and shapes of weights
            if isinstance(value, dict) and len(entry) < DEPTH and not moments:
                yield from walk(value, (*entry, str(name)))

    yield from walk(contents.entries, ())


def _candidates(path: Path, entry: tuple[str, ...], state: State) -> list[Candidate]:
    state = _unwrapped(path, state)
    encoders = {
        name.removesuffix(layout.anchor): layout
        for name in state
        for layout in KNOWN
        if name == layout.anchor or name.endswith(f".{layout.anchor}")
    }
    decoders = [name.removesuffix(DECODER_ANCHOR) for name in state if f".{name}".endswith(f".{DECODER_ANCHOR}")]
    candidates = []
    for prefix, layout in encoders.items():
        near = [decoder for decoder in decoders if prefix in _nearest(decoder, list(encoders))]
        decoder = _nearest(prefix, near)[0] if near else None
        others = tuple(other for other in encoders if other != prefix and other.startswith(prefix))
        candidates.append(Candidate(path, layout, entry, state, prefix, decoder, others))
    return candidates


def _unwrapped(path: Path, state: State) -> State:
    """Return the tensors by their names without the parts that wrappers add."""
    bare: dict[str, Tensor] = {}
    for name, tensor in state.items():
        clean = ".".join(part for part in name.split(".") if part not in WRAPPERS) or name
        if clean in bare and not _same(bare[clean], tensor):
            raise CheckpointError(f"{path} holds {clean} twice, with and without the prefix of a wrapper")
        bare[clean] = tensor
    return bare


def _parts(prefix: str) -> tuple[str, ...]:
    return tuple(prefix.rstrip(".").split(".")) if prefix else ()


def _nearest(prefix: str, others: list[str]) -> list[str]:
    """Return the `others` that share the most leading parts with a prefix."""

    def shared(other: str) -> int:
        pairs = list(zip(_parts(prefix), _parts(other), strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    most = max(map(shared, others))
    return [other for other in others if shared(other) == most]


def _chosen(contents: Contents, candidates: list[Candidate], key: str | None) -> Candidate:
    """Return the candidate that `key` names, or the only one; copies of weights do not count."""
    if key is not None:
        named = [candidate for candidate in candidates if candidate.key == key]
        named = named or [candidate for candidate in candidates if _names(key, candidate.key)]
        if not named:
            raise CheckpointError(f"key must name weights in {contents.path}, {_told(candidates)}; it is {key!r}")
        candidates = named
    if len(candidates) == 1:
        return candidates[0]
    largest = sorted(candidates, key=lambda candidate: -len(candidate.official[0]))
    different: list[Candidate] = []
    for candidate in largest:
        if not any(_covers(other, candidate) for other in different):
            different.append(candidate)
    if len(different) > 1:
        told = _told([candidate for candidate in candidates if candidate in different])
        raise CheckpointError(f"{contents.path} holds several models; key must name one of {told}")
    return different[0]


def _names(key: str, full: str) -> bool:
    """Return whether the parts of a key follow each other in a candidate's."""
    return f".{key}." in f".{full}."


def _covers(larger: Candidate, smaller: Candidate) -> bool:
    tensors, _ = larger.official
    return all(name in tensors and _same(tensors[name], tensor) for name, tensor in smaller.official[0].items())


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if _unusable(a) or _unusable(b):
        return False
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _told(candidates: list[Candidate]) -> str:
    described = []
    for candidate in candidates:
        tensors, _ = candidate.official
        values = sum(tensor.numel() for tensor in tensors.values())
        kind = "encoder alone" if candidate.decoder is None else "encoder and decoder"
        described.append(f"{candidate.key} ({len(tensors)} tensors, {values:,} values, {kind})")
    return ", ".join(described)


def _why_none(contents: Contents, states: list[tuple[tuple[str, ...], State]]) -> str:
    entries, names = contents.entries, [name for _, state in states for name in state]
    if any(name.endswith("flat_param") for name in names):
        return (
            f"{contents.path} holds flattened parameters of FSDP; save a full state_dict, which has a tensor for each parameter"
        )
    optimizer = any("optimizer" in str(name) for name in entries) or {"state", "param_groups"} <= entries.keys()
    if optimizer and not any("." in name for name in names):
        return f"{contents.path} holds the state of an optimizer, and no weights"
    if not names:
        return f"{contents.path} holds no state_dict: neither it nor any of its entries has a tensor by name"
    official, transformers, *others = (layout.anchor for layout in KNOWN)
    return (
        f"{contents.path} holds no Masked Autoencoder: it has neither {official} (official, timm) nor vit.{transformers} "
        f"(transformers) nor {' nor '.join(others)} (mmpretrain, torchvision), below any prefix, but {listed(names)}"
    )
