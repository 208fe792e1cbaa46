"""The report of which tensors of a checkpoint were loaded."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import listed


@dataclass(frozen=True)
class LoadReport:
    """A report of the tensors of a checkpoint that were loaded and those that were not.

    layout          "official" (also timm's and maefast's own names), "transformers", "mmpretrain"
                    or "torchvision"
    source          where in the checkpoint the weights were: the entry, and the prefixes of their
                    names
    missing         tensors of the model, or of the written layout, that the checkpoint lacks
    unexpected      tensors of the checkpoint that the model, or the layout written, has no place
                    for
    has_decoder     whether the checkpoint holds the decoder
    norm_pix_loss   whether its target was normalised pixels; None if the checkpoint does not store
                    it
    positions       what was done to positions stored for another grid, a sentence each
    adapted         what was done to other tensors so that they fit, a sentence each
    ignored         other entries of the checkpoint: optimizer state, epoch, counters of
                    normalisation and averages, other modules, extra tensors of a variant of MAE
    warnings        possible mistakes, although all tensors fit
    """

    path: Path
    layout: str
    source: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    has_decoder: bool
    norm_pix_loss: bool | None
    positions: tuple[str, ...]
    adapted: tuple[str, ...]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return the report as JSON values, with only the name of the file."""
        entries = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"file": self.path.name} | {name: value for name, value in entries.items() if name != "path"}

    def __str__(self) -> str:
        target = {True: "normalised pixels", False: "raw pixels", None: "not stored in the file"}[self.norm_pix_loss]
        lines = [
            f"{self.path}: {self.layout} layout, {'with' if self.has_decoder else 'without'} decoder",
            f"taken from: {self.source}",
            f"target: {target}",
            f"missing: {listed(list(self.missing)) or 'nothing'}",
            f"unexpected: {listed(list(self.unexpected)) or 'nothing'}",
        ]
        lines += [f"positions: {change}" for change in self.positions]
        lines += [f"adapted: {change}" for change in self.adapted]
        lines += [f"ignored: {listed(list(self.ignored), most=12)}"] if self.ignored else []
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])
