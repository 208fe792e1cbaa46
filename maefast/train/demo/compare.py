"""Timing of the same training steps with maefast and the plain reference, in rotation."""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...model import MAE
from ..baseline import reference_on
from ..optim import adamw
from ..step import training_step

STEPS_PER_ROUND = 4  # steps of each model
FEWEST_ROUNDS = 6  # needed for a 95 % interval of a median
SPREAD = 0.1  # width of the interval over the median at which rounds end
SECONDS = 30.0  # after which rounds end in any case
COMPARED_ROUNDS = 10  # rounds whose losses are compared: later ones drift apart by rounding


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % confidence interval of the median of at least 6 independent values.

    The k-th smallest of n values lies above the median with the probability that fewer than k of n
    coin tosses show heads.
    """
    n, k, ways, tail = len(values), 0, 1, 0
    while 40 * (tail + ways) <= 2**n:  # at most 2.5 % on either side
        tail, ways, k = tail + ways, ways * (n - k) // (k + 1), k + 1
    if k == 0:
        raise ValueError(f"values must be {FEWEST_ROUNDS} or more for a 95 % interval; there are {n}")
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


@dataclass(frozen=True)
class Comparison:
    """Seconds per step, from a uint8 batch to updated weights, as the mean of each timed round."""

    batch_size: int
    seconds: Sequence[float]  # of maefast
    reference_seconds: Sequence[float]
    loss_difference: float  # the largest, relative, over the first steps

    @property
    def ratios(self) -> list[float]:
        return [reference / own for own, reference in zip(self.seconds, self.reference_seconds, strict=True)]

    @property
    def ratio(self) -> float:
        """The speed-up of maefast, the median over the rounds; below 1 it is slower."""
        return median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """A 95 % confidence interval of `ratio`."""
        return median_interval(self.ratios)

    @property
    def settled(self) -> bool:
        """Whether the interval is narrower than SPREAD."""
        low, high = self.interval
        return high - low < SPREAD * self.ratio

    @property
    def speed(self) -> str:
        low, high = self.interval
        return f"{self.ratio:.2f} x, {low:.2f} to {high:.2f}"

    def __str__(self) -> str:
        slower = "; maefast is SLOWER here" if self.interval[1] < 0.995 else ""
        wide = "" if self.settled else "; a wide interval: few rounds, or a busy machine"
        own, reference = (f"{median(seconds) * 1e3:.1f}" for seconds in (self.seconds, self.reference_seconds))
        rounds = f"median and its 95 % interval over {len(self.seconds)} rounds of {STEPS_PER_ROUND} steps each"
        return (
            f"speed against the eager reference {self.speed}{slower}{wide} ({own} against {reference} ms a step of "
            f"{self.batch_size} images; {rounds}; losses within {self.loss_difference:.0e})"
        )


def compare(
    config: dict[str, Any], images: Iterator[Tensor], *, rounds: int, lr: float, mask_ratio: float, seed: int
) -> Comparison:
    """Train an MAE and a ReferenceMAE with the same weights, batches and noise, in rotation.

    rounds   the most rounds to time; after 6, they end when the ratio settles or after SECONDS
    The reference's time includes normalisation to float images, which maefast does in its step. The
    first round is a warm-up and not timed.
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
    difference, started = 0.0, time.perf_counter()
    for done in range(max(rounds, FEWEST_ROUNDS) + 1):
        batches = [next(images) for _ in range(STEPS_PER_ROUND)]
        noises = [torch.rand(len(batch), model.patch_embed.num_patches, generator=generator) for batch in batches]
        losses = {}
        for step in (own_step, reference_step) if done % 2 else (reference_step, own_step):
            start = time.perf_counter()
            losses[step] = [step(batch, noise).item() for batch, noise in zip(batches, noises, strict=True)]
            if done:
                times[step].append((time.perf_counter() - start) / STEPS_PER_ROUND)
        if done <= COMPARED_ROUNDS:
            pairs = zip(losses[own_step], losses[reference_step], strict=True)
            difference = max([difference, *(abs(own - ref) / max(abs(ref), 1e-12) for own, ref in pairs)])
        comparison = Comparison(len(batches[0]), times[own_step], times[reference_step], difference)
        if done >= FEWEST_ROUNDS and (comparison.settled or time.perf_counter() - started > SECONDS):
            break
    return comparison
