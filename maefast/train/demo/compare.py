"""The same training steps with maefast and with the plain reference, in turns."""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...model import MAE
from ..baseline import reference_on
from ..optim import adamw
from ..step import training_step

STEPS_PER_TURN = 4


@dataclass(frozen=True)
class Comparison:
    """Medians over the timed steps; a step goes from a uint8 batch to updated weights."""

    batch_size: int
    steps: int  # timed, of each of the two
    seconds: float  # of a maefast step
    reference_seconds: float
    loss_difference: float  # the largest, relative, over all steps

    @property
    def ratio(self) -> float:
        """How many times faster maefast is; below 1 it is slower."""
        return self.reference_seconds / self.seconds

    def __str__(self) -> str:
        slower = "; maefast is SLOWER here" if self.ratio < 0.995 else ""
        return (
            f"{self.ratio:.2f} x the speed of the eager reference{slower} ({self.seconds * 1e3:.1f} against "
            f"{self.reference_seconds * 1e3:.1f} ms a step of {self.batch_size} images, medians of {self.steps} steps each, "
            f"in turns; losses within {self.loss_difference:.0e})"
        )


def compare(
    config: dict[str, Any], images: Iterator[Tensor], *, turns: int, lr: float, mask_ratio: float, seed: int
) -> Comparison:
    """Train `MAE(**config)` and a ReferenceMAE from the same weights on the same batches and noise, turn by turn.

    The reference gets float images, normalised in its own time: maefast does that inside its step. The first turn warms up and
    is not timed.
    """
    model = MAE(**config)
    twin = copy.deepcopy(model)
    reference = reference_on(twin)
    optimizer, reference_optimizer = adamw(model, lr), adamw(twin, lr)
    generator = torch.Generator().manual_seed(seed)

    def own_step(batch: Tensor, noise: Tensor) -> Tensor:
        return training_step(model, optimizer, batch, mask_ratio, noise=noise, return_pred=False)

    def reference_step(batch: Tensor, noise: Tensor) -> Tensor:
        return training_step(reference, reference_optimizer, batch, mask_ratio, noise=noise)

    times: dict[Any, list[float]] = {own_step: [], reference_step: []}
    difference, batch_size = 0.0, 0
    for turn in range(turns + 1):
        batches = [next(images) for _ in range(STEPS_PER_TURN)]
        batch_size = len(batches[0])
        noises = [torch.rand(batch_size, model.patch_embed.num_patches, generator=generator) for _ in batches]
        losses = {}
        for step in (own_step, reference_step) if turn % 2 else (reference_step, own_step):
            losses[step] = list[float]()
            for batch, noise in zip(batches, noises, strict=True):
                start = time.perf_counter()
                losses[step].append(step(batch, noise).item())
                if turn:
                    times[step].append(time.perf_counter() - start)
        pairs = zip(losses[own_step], losses[reference_step], strict=True)
        difference = max([difference, *(abs(own - ref) / max(abs(ref), 1e-12) for own, ref in pairs)])
    return Comparison(batch_size, turns * STEPS_PER_TURN, median(times[own_step]), median(times[reference_step]), difference)
