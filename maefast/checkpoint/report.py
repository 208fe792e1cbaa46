"""What was loaded of a checkpoint, and what was not."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import listed


@dataclass(frozen=True)
class LoadReport:
    """What was loaded of a checkpoint and what was not, to print.

    layout          "official" (also timm's and maefast's own names), "transformers", "mmpretrain"
                    or "torchvision"
    source          where in the checkpoint the weights were: the entry, and the prefixes of their
                    names
    missing         tensors that the model, or the layout written, has and the checkpoint has not
    unexpected      tensors of the checkpoint that the model, or the layout written, has no place
                    for
    has_decoder     whether the checkpoint holds the decoder
    norm_pix_loss   whether its target was normalised pixels; None where the checkpoint does not
                    tell
    positions       what was done to positions stored for another grid, a sentence each
    adapted         what was done to other tensors so that they fit, a sentence each
    ignored         what a checkpoint holds beside the model: the optimizer's state, the epoch,
                    counters of normalisation and of averages, other modules, what a variant of MAE
                    has beyond it
    warnings        what may be wrong although everything fitted
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
        target = {True: "normalised pixels", False: "raw pixels", None: "the file does not tell"}[self.norm_pix_loss]
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
