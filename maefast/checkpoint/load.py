"""Loading checkpoints into models, and saving models in maefast's own layout."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._version import __version__
from . import candidates, files
from .architecture import OUR_MODEL_TYPE, Facts, facts_of, find_grid, infer, is_decoder, is_head, misfit, of_model
from .files import CheckpointError, listed
from .positions import Grid, refitted
from .report import LoadReport
from .statistics import Statistics, warn_of_model
from .target import warn_of_target

M = TypeVar("M", bound=nn.Module)

# begins the names of what a variant of MAE (maefast.train.variants) has beyond it
VARIANT = "variant_"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_WEIGHT = re.compile(r"(?!head\.).*\.(weight|bias)|cls_token|pos_embed|mask_token|decoder_pos_embed")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by its official names.

    tensors     floating-point tensors of an MAE or its encoder, and of its head
    variant     extra tensors of a variant of MAE
    counters    integer tensors
    """

    path: Path
    layout: str
    source: str
    tensors: dict[str, Tensor]
    variant: dict[str, Tensor]
    counters: dict[str, Tensor]
    facts: Facts
    ignored: tuple[str, ...]

    @property
    def statistics(self) -> Statistics | None:
        """Return mean and std of the images, or None if the checkpoint does not store them."""
        mean, std = self.facts.mean, self.facts.std
        return None if mean is None or std is None else (mean, std)

    @property
    def has_decoder(self) -> bool:
        return any(map(is_decoder, self.tensors))

    @property
    def head(self) -> list[str]:
        return [name for name in (*self.tensors, *self.counters) if is_head(name)]

    def without(self, names: Iterable[str]) -> "Checkpoint":
        """Return the checkpoint without some of its tensors."""
        names = set(names)
        kept = ({name: t for name, t in part.items() if name not in names} for part in (self.tensors, self.counters))
        tensors, counters = kept
        return replace(self, tensors=tensors, counters=counters)

    def report(
        self,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        positions: Iterable[str] = (),
        adapted: Iterable[str] = (),
        warnings: Iterable[str] = (),
    ) -> LoadReport:
        return LoadReport(
            path=self.path,
            layout=self.layout,
            source=self.source,
            missing=tuple(missing),
            unexpected=tuple(unexpected),
            has_decoder=self.has_decoder,
            norm_pix_loss=self.facts.norm_pix_loss,
            positions=tuple(positions),
            adapted=tuple(adapted),
            ignored=(*self.ignored, *self.variant, *self.counters),
            warnings=tuple(warnings),
        )

    def warn_of_variant(self) -> list[str]:
        """Return a warning for when its decoder is used."""
        if not self.variant or not self.has_decoder:
            return []
        return [f"the checkpoint is of a variant of MAE, with {listed(list(self.variant))}, and so is its decoder"]

    def warn_of_head(self, wanted: str) -> list[str]:
        """Return a warning for when its head is left out."""
        return [f"the head of the checkpoint, {_shape_of(self.head, self.tensors)}, is left out: {wanted}"] if self.head else []


def read(path: str | Path, key: str | None = None) -> Checkpoint:
    """Return a checkpoint of any known layout. Raises as candidates.read, and CheckpointError for
    weights that are no floats."""
    weights = candidates.read(path, key)
    tensors, counters, variant = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in weights.tensors.items():
        if name.startswith(VARIANT):
            variant[name] = tensor
        elif tensor.dtype in FLOATS:
            tensors[name] = tensor
        elif _WEIGHT.fullmatch(name) or tensor.is_floating_point() or tensor.is_complex():
            raise CheckpointError(f"{weights.path} must hold floating-point tensors; it has {name} of {tensor.dtype}")
        else:
            counters[name] = tensor
    return Checkpoint(
        path=weights.path,
        layout=weights.layout,
        source=weights.source,
        tensors=tensors,
        variant=variant,
        counters=counters,
        facts=facts_of(weights, tensors),
        ignored=(*weights.ignored, *weights.beside),
    )


def load(model: nn.Module, path: str | Path, *, key: str | None = None, stored_grid: Grid | None = None) -> LoadReport:
    """Load a checkpoint of any known layout into an MAE or its encoder.

    key            which of several weights, such as an average: the entry's name, the prefix of
                   the names, or both, joined by a dot
    stored_grid    (rows, columns) of the stored positions, overriding the checkpoint. None:
                   config.json's, else the grid whose sin-cos positions they are, else the model's
                   if it has as many patches, else a square

    For another grid, sin-cos positions are computed and trained positions are resized. The
    checkpoint may lack the decoder, and a `head` or `fc_norm` of the model; the report names them.
    A model without decoder does not load the checkpoint's. A head of another shape is not loaded,
    with a warning. Counters, which are integers, are loaded if the model has them. Everything else
    must fit. A model on the meta device gets all its tensors from the checkpoint, which must have
    them.
    Raises TypeError for another kind of model, FileNotFoundError, CheckpointError (a ValueError),
    and RuntimeError if safetensors is needed and not installed; the model is then unchanged, bit
    for bit.
    """
    check_model(model)
    checkpoint = read(path, key)
    return _load(model, checkpoint, stored_positions(model, checkpoint, stored_grid))


def check_model(model: nn.Module) -> None:
    if not hasattr(getattr(model, "patch_embed", None), "grid_size"):
        raise TypeError(f"model must be an MAE or its encoder; it is a {type(model).__name__}")


def stored_positions(model: Any, checkpoint: Checkpoint, stored_grid: Grid | None) -> Grid:
    """Return the grid of a checkpoint's positions, by default the model's."""
    return find_grid(checkpoint.tensors, checkpoint.facts, checkpoint.path, stored_grid, model.patch_embed.grid_size)


def from_pretrained(
    cls: Callable[..., M], path: str | Path, *, key: str | None = None, stored_grid: Grid | None = None, **overrides: Any
) -> tuple[M, LoadReport]:
    """Return a model of class `cls` with the architecture and the weights of a checkpoint.

    cls            a class, or a function that takes MAE's arguments and makes an encoder of them
    overrides      arguments of the constructor that the checkpoint lacks or that override it, such
                   as img_size
    Raises as `load`, and CheckpointError if num_heads or decoder_num_heads is neither stored, nor
    implied by the width, nor given.
    """
    checkpoint = read(path, key)
    about = (checkpoint.tensors, checkpoint.facts, checkpoint.path)
    grid = find_grid(*about, stored_grid)
    architecture = infer(*about, grid)
    architecture.checked(checkpoint.without(checkpoint.head).tensors, checkpoint.path)
    architecture.require_heads(checkpoint.path, given=overrides.keys())
    model = cls(**architecture.arguments() | overrides)
    given = {"target_given": "norm_pix_loss" in overrides, "statistics_given": "mean" in overrides}
    return model, _load(model, checkpoint, grid, **given)


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write an MAE to `folder`, which is created if needed: model.safetensors with the official
    names, and config.json with the constructor's arguments. Files of these names are replaced.

    Raises ValueError for a norm_layer other than nn.LayerNorm, OSError, and RuntimeError if
    safetensors is not installed.
    """
    config = {"model_type": OUR_MODEL_TYPE, "maefast_version": __version__} | asdict(of_model(model))
    folder = Path(folder)
    files.write_safetensors(model.state_dict(), folder / files.WEIGHTS)
    files.write_json(config, folder / files.CONFIG)


def _load(
    model: nn.Module, checkpoint: Checkpoint, grid: Grid, target_given: bool = False, statistics_given: bool = False
) -> LoadReport:
    ours = model.state_dict()
    checkpoint, left_out, warnings = without_other_head(model, checkpoint)
    counters = {name: tensor for name, tensor in checkpoint.counters.items() if name in ours}
    known = {name: tensor for name, tensor in checkpoint.variant.items() if name in ours}
    variant = {name: tensor for name, tensor in checkpoint.variant.items() if name not in known}
    checkpoint = replace(checkpoint.without(counters), variant=variant)
    theirs = checkpoint.tensors | counters | known
    missing, unexpected = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    _check_names(model, checkpoint, missing, unexpected)
    check_heads(model, checkpoint)
    theirs, positions = refit(model, replace(checkpoint, tensors=theirs), grid)
    put(model, checkpoint, {name: theirs[name] for name in ours if name in theirs})
    warnings += _warnings(model, checkpoint, target_given)
    warnings += [] if statistics_given else warn_of_model(model, checkpoint.statistics)
    return checkpoint.report(missing, [*unexpected, *left_out], positions, warnings=warnings)


def without_other_head(model: nn.Module, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str], list[str]]:
    """Return the checkpoint without a head of other classes, the names left out, and warnings."""
    ours = {name: tensor for name, tensor in model.state_dict().items() if is_head(name)}
    everything = checkpoint.tensors | checkpoint.counters
    theirs = {name: everything[name] for name in checkpoint.head}
    same = ours.keys() == theirs.keys() and all(ours[name].shape == tensor.shape for name, tensor in theirs.items())
    if same or not theirs:
        return checkpoint, [], []
    wanted = f"{type(model).__name__} has {_shape_of(list(ours), ours) if ours else 'none'}"
    # an encoder that was made without a head has no use for one
    warn = bool(ours) or has_decoder(model)
    return checkpoint.without(theirs), list(theirs), checkpoint.warn_of_head(wanted) if warn else []


def _shape_of(names: list[str], tensors: Mapping[str, Tensor]) -> str:
    """Return the shape of the last matrix of a head, which identifies it."""
    matrices = [name for name in names if name in tensors and tensors[name].dim() == 2]
    return f"{matrices[-1]} {tuple(tensors[matrices[-1]].shape)}" if matrices else listed(names)


def has_decoder(model: nn.Module) -> bool:
    return any(map(is_decoder, model.state_dict()))


def refit(model: Any, checkpoint: Checkpoint, grid: Grid) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors with positions fitted to the model's grid, and what was done."""
    fitted, changes = dict(checkpoint.tensors), list[str]()
    for name in sorted({"pos_embed", "decoder_pos_embed"} & fitted.keys() & model.state_dict().keys()):
        L = grid[0] * grid[1]
        if fitted[name].dim() != 3 or fitted[name].shape[:2] != (1, 1 + L):
            found = tuple(fitted[name].shape)
            raise CheckpointError(f"{name} of {checkpoint.path} must be (1, {1 + L}, D) for {L} patches; its shape is {found}")
        fitted[name], change = refitted(fitted[name], grid, model.patch_embed.grid_size)
        changes += [f"{name} {change}"] if change else []
    return fitted, changes


def put(model: nn.Module, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the model. Raises CheckpointError, before any copy, if one does not fit."""
    ours = model.state_dict()
    for name, theirs in weights.items():
        facts: tuple[Any, Any] | None = None
        if theirs.shape != ours[name].shape:
            facts = tuple(theirs.shape), tuple(ours[name].shape)
        elif theirs.is_floating_point() != ours[name].is_floating_point():
            facts = theirs.dtype, ours[name].dtype
        if facts is not None:
            differ = f"{name} is {facts[0]} in the checkpoint and {facts[1]} in the model"
            raise CheckpointError(f"{checkpoint.path} does not fit {type(model).__name__}: {differ}")
    on_meta = [name for name, tensor in ours.items() if tensor.is_meta]
    if lacking := [name for name in on_meta if name not in weights]:
        raise CheckpointError(
            f"{checkpoint.path} lacks {listed(lacking)}, which {type(model).__name__} has on the meta device, without values"
        )
    if on_meta:  # to_empty would make memory that the copies below fill once more
        weights = {name: tensor.to(ours[name].dtype, copy=True) for name, tensor in weights.items()}
    model.load_state_dict(weights, strict=False, assign=bool(on_meta))


def _check_names(model: nn.Module, checkpoint: Checkpoint, missing: list[str], unexpected: list[str]) -> None:
    """Raise CheckpointError unless only a decoder or head is missing, or a decoder or norm left."""
    names = model.state_dict().keys()
    decoder, fc_norm = any(map(is_decoder, names)), any(name.startswith("fc_norm.") for name in names)

    def may_miss(name: str) -> bool:
        return name.startswith(("head.", "fc_norm.")) or (is_decoder(name) and not checkpoint.has_decoder)

    def may_stay(name: str) -> bool:
        return not decoder and (is_decoder(name) or (fc_norm and name.startswith("norm.")))

    strange, lacking = [name for name in unexpected if not may_stay(name)], [name for name in missing if not may_miss(name)]
    if strange or lacking:
        raise CheckpointError(f"{checkpoint.path} does not fit {type(model).__name__}: {misfit(strange, lacking)}")


def check_heads(model: Any, checkpoint: Checkpoint, stacks: Iterable[str] = ("blocks", "decoder_blocks")) -> None:
    """Raise CheckpointError for another number of heads, which the shapes do not show."""
    for name, blocks in (("num_heads", "blocks"), ("decoder_num_heads", "decoder_blocks")):
        told, theirs = getattr(checkpoint.facts, name), f"{blocks}.0.attn.qkv.weight"
        if blocks not in stacks or told is None or theirs not in checkpoint.tensors or not len(getattr(model, blocks, ())):
            continue
        if (heads := getattr(model, blocks)[0].attn.num_heads) != told:
            raise CheckpointError(f"{name} is {told} in {checkpoint.path} and {heads} in {type(model).__name__}")


def _warnings(model: nn.Module, checkpoint: Checkpoint, target_given: bool) -> list[str]:
    wanted = getattr(model, "norm_pix_loss", None)
    if wanted is None:  # an encoder: it has no target
        return []
    if not checkpoint.has_decoder:
        return ["the checkpoint holds no decoder; the model keeps its own"]
    return checkpoint.warn_of_variant() + ([] if target_given else warn_of_target(checkpoint, wanted))
