"""Checkpoints into models, and models into maefast's own layout."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from .._version import __version__
from . import files
from .architecture import OUR_MODEL_TYPE, Facts, facts_of, find_grid, infer, is_decoder, misfit, of_model
from .files import CheckpointError, listed
from .layouts import official_names
from .positions import Grid, refitted

M = TypeVar("M", bound=nn.Module)

VARIANT = "variant_"  # begins the names of what a variant of MAE (maefast.train.variants) has beyond it


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint; print it.

    layout          "official" (also timm's and maefast's own names) or "transformers"
    missing         tensors that the model, or the layout written, has and the checkpoint has not
    unexpected      tensors of the checkpoint that the model, or the layout written, has no place for
    has_decoder     whether the checkpoint holds the decoder
    norm_pix_loss   whether its target was normalised pixels; None where the checkpoint does not tell
    positions       what was done to positions stored for another grid, a sentence each
    ignored         entries of a training checkpoint that are no weights: the optimizer's state, the epoch; and what a variant of
                    MAE has beyond it
    warnings        what may be wrong although everything fitted
    """

    path: Path
    layout: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    has_decoder: bool
    norm_pix_loss: bool | None
    positions: tuple[str, ...]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        target = {True: "normalised pixels", False: "raw pixels", None: "the file does not tell"}[self.norm_pix_loss]
        lines = [
            f"{self.path}: {self.layout} layout, {'with' if self.has_decoder else 'without'} decoder",
            f"target: {target}",
            f"missing: {listed(list(self.missing)) or 'nothing'}",
            f"unexpected: {listed(list(self.unexpected)) or 'nothing'}",
        ]
        lines += [f"positions: {change}" for change in self.positions]
        lines += [f"ignored: {', '.join(self.ignored)}"] if self.ignored else []
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by its official names."""

    path: Path
    layout: str
    tensors: dict[str, Tensor]
    variant: dict[str, Tensor]  # what it has beyond an MAE's
    facts: Facts
    ignored: tuple[str, ...]

    @property
    def has_decoder(self) -> bool:
        return any(map(is_decoder, self.tensors))

    def report(
        self,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        positions: Iterable[str] = (),
        warnings: Iterable[str] = (),
    ) -> LoadReport:
        norm_pix_loss = self.facts.norm_pix_loss
        facts = (self.path, self.layout, tuple(missing), tuple(unexpected), self.has_decoder, norm_pix_loss)
        return LoadReport(*facts, tuple(positions), (*self.ignored, *self.variant), tuple(warnings))

    def warn_of_variant(self) -> list[str]:
        """What to say where its decoder is put to use."""
        if not self.variant or not self.has_decoder:
            return []
        return [f"the checkpoint is of a variant of MAE, with {listed(list(self.variant))}, and so is its decoder"]


def read(path: str | Path) -> Checkpoint:
    """A checkpoint of any known layout. Raises as files.read, and CheckpointError for another architecture."""
    contents = files.read(path)
    layout, tensors = official_names(contents)
    if strange := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise CheckpointError(
            f"{contents.path} must hold floating-point tensors; it has {listed(strange)} of {tensors[strange[0]].dtype}"
        )
    variant = {name: tensor for name, tensor in tensors.items() if name.startswith(VARIANT)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in variant}
    return Checkpoint(contents.path, layout, tensors, variant, facts_of(contents, tensors, layout), tuple(contents.ignored))


def load(model: nn.Module, path: str | Path, *, stored_grid: Grid | None = None) -> LoadReport:
    """Load a checkpoint of any known layout into a model with official names, an MAE or its encoder.

    stored_grid    (rows, columns) of the stored positions, where the checkpoint tells something else or nothing: by default
                   config.json's, else the grid whose sin-cos they are, else the model's if it has as many patches, else a square

    Positions of another grid are computed anew where they are sin-cos, and resized where they were trained. A checkpoint may lack
    the decoder, and a model may have a `head` or `fc_norm` that the checkpoint lacks; the report names them. A model without
    decoder leaves the checkpoint's where it is. Everything else must fit.
    Raises TypeError for another kind of model, FileNotFoundError, CheckpointError (a ValueError), and RuntimeError where
    safetensors is needed and not installed; the model is then as it was, bit for bit.
    """
    if not hasattr(getattr(model, "patch_embed", None), "grid_size"):
        raise TypeError(f"model must be an MAE or its encoder; it is a {type(model).__name__}")
    checkpoint = read(path)
    grid = find_grid(checkpoint.tensors, checkpoint.facts, checkpoint.path, stored_grid, model.patch_embed.grid_size)  # type: ignore[arg-type, union-attr]
    return _load(model, checkpoint, grid)


def from_pretrained(
    cls: Callable[..., M], path: str | Path, *, stored_grid: Grid | None = None, **overrides: Any
) -> tuple[M, LoadReport]:
    """A model of class `cls`, which has MAE's constructor, with the architecture and the weights of a checkpoint.

    cls            a class, or a function that takes MAE's arguments and makes an encoder of them
    overrides      arguments of the constructor that the checkpoint does not tell, or that shall differ, such as img_size
    Raises as `load`, and CheckpointError where num_heads or decoder_num_heads is neither told, nor implied by the width, nor
    given.
    """
    checkpoint = read(path)
    about = (checkpoint.tensors, checkpoint.facts, checkpoint.path)
    grid = find_grid(*about, stored_grid)
    architecture = infer(*about, grid)
    architecture.checked(checkpoint.tensors, checkpoint.path)
    architecture.require_heads(checkpoint.path, given=overrides.keys())
    model = cls(**architecture.arguments() | overrides)
    return model, _load(model, checkpoint, grid, target_given="norm_pix_loss" in overrides)


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write an MAE to `folder`, made where there is none: model.safetensors with the official names, and config.json with the
    constructor's arguments. Files of these names are replaced.

    Raises ValueError for a norm_layer other than nn.LayerNorm, OSError, and RuntimeError where safetensors is not installed.
    """
    config = {"model_type": OUR_MODEL_TYPE, "maefast_version": __version__} | asdict(of_model(model))
    folder = Path(folder)
    files.write_safetensors(model.state_dict(), folder / files.WEIGHTS)
    files.write_json(config, folder / files.CONFIG)


def _load(model: nn.Module, checkpoint: Checkpoint, grid: Grid, target_given: bool = False) -> LoadReport:
    ours = model.state_dict()
    known = {name: tensor for name, tensor in checkpoint.variant.items() if name in ours}
    checkpoint = replace(checkpoint, variant={name: t for name, t in checkpoint.variant.items() if name not in known})
    theirs = checkpoint.tensors | known
    missing, unexpected = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    _check_names(model, checkpoint, missing, unexpected)
    _check_heads(model, checkpoint)
    positions = []
    for name in {"pos_embed", "decoder_pos_embed"} & ours.keys() & theirs.keys():
        theirs[name], change = refitted(theirs[name], grid, model.patch_embed.grid_size)  # type: ignore[arg-type, union-attr]
        positions += [f"{name} {change}"] if change else []
    weights = {name: theirs[name] for name in ours if name in theirs}
    for name, tensor in weights.items():
        if tensor.shape != ours[name].shape:
            raise CheckpointError(
                f"{checkpoint.path} does not fit {type(model).__name__}: {name} is {tuple(tensor.shape)} in the checkpoint and "
                f"{tuple(ours[name].shape)} in the model"
            )
    model.load_state_dict(weights, strict=False)
    return checkpoint.report(missing, unexpected, sorted(positions), _warnings(model, checkpoint, target_given))


def _check_names(model: nn.Module, checkpoint: Checkpoint, missing: list[str], unexpected: list[str]) -> None:
    """Raise unless what is missing is a whole decoder or a head, and what is left over is one that the model does not have."""
    names = model.state_dict().keys()
    decoder, fc_norm = any(map(is_decoder, names)), any(name.startswith("fc_norm.") for name in names)

    def may_miss(name: str) -> bool:
        return name.startswith(("head.", "fc_norm.")) or (is_decoder(name) and not checkpoint.has_decoder)

    def may_stay(name: str) -> bool:
        return not decoder and (is_decoder(name) or name.startswith("head.") or (fc_norm and name.startswith("norm.")))

    strange, lacking = [name for name in unexpected if not may_stay(name)], [name for name in missing if not may_miss(name)]
    if strange or lacking:
        raise CheckpointError(f"{checkpoint.path} does not fit {type(model).__name__}: {misfit(strange, missing)}")


def _check_heads(model: Any, checkpoint: Checkpoint) -> None:
    """Raise where the checkpoint tells other heads: the shapes would fit, and the model compute something else."""
    for name, blocks in (("num_heads", "blocks"), ("decoder_num_heads", "decoder_blocks")):
        told, theirs = getattr(checkpoint.facts, name), f"{blocks}.0.attn.qkv.weight"
        if told is None or theirs not in checkpoint.tensors or not len(getattr(model, blocks, ())):
            continue
        if (heads := getattr(model, blocks)[0].attn.num_heads) != told:
            raise CheckpointError(f"{name} is {told} in {checkpoint.path} and {heads} in {type(model).__name__}")


def _warnings(model: nn.Module, checkpoint: Checkpoint, target_given: bool) -> list[str]:
    wanted, target = getattr(model, "norm_pix_loss", None), checkpoint.facts.norm_pix_loss
    if wanted is None:  # an encoder: it has no target
        return []
    if not checkpoint.has_decoder:
        return ["the checkpoint holds no decoder; the model keeps its own"]
    warnings = checkpoint.warn_of_variant()
    if target_given:
        return warnings
    if target is None:
        return [*warnings, unknown_target(f"norm_pix_loss is {wanted}")]
    if target != wanted:
        return [*warnings, f"norm_pix_loss is {wanted}, and the checkpoint was trained with norm_pix_loss={target}"]
    return warnings


def unknown_target(taken: str) -> str:
    why = "the official visualize files, for one, are of raw ones"
    return f"the checkpoint does not tell whether its target was normalised pixels; {taken}; {why}"
