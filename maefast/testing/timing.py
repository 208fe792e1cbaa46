"""Timing in rotation: every contender of a group runs once a round, in an order shuffled per round;
rounds are the samples."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import _torch

Run = Callable[[int], Any]  # does one sample's work on input set i
_HEAD_START = 1_000_000  # cycles of the GPU


@dataclass(frozen=True)
class Budget:
    """The number of rounds: as many as fit into `seconds`, from `least` to `most`."""

    seconds: float
    least: int
    most: int

    def rounds(self, round_s: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / max(round_s, 1e-9))))


class WallTimer:
    """A timer of a call on the CPU, in seconds."""

    def __call__(self, run: Run, i: int) -> float:
        start = time.perf_counter()
        run(i)
        return time.perf_counter() - start


class CudaTimer:
    """A timer of a call's kernels on the GPU, in seconds, between two events, after a write that
    evicts the L2 cache.

    The GPU is kept busy before each sample, so that the kernels of a short call are queued when it
    starts.
    """

    def __init__(self, device: torch.device):
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * l2, dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Run, i: int) -> float:
        self.flush.zero_()
        _torch.sleep_on_gpu(_HEAD_START)
        self.start.record()
        run(i)
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def timer_for(device: torch.device) -> WallTimer | CudaTimer:
    return CudaTimer(device) if device.type == "cuda" else WallTimer()


def order(names: list[str], round_: int, seed: int = 0) -> list[str]:
    """Return the order of one round: shuffled, and the same in every run."""
    return random.Random(f"{seed}/{round_}").sample(names, len(names))


def rotate(
    runs: Mapping[str, Run], timer: Callable[[Run, int], float], budget: Budget, sets: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Return samples in seconds per contender; round r works on input set r % sets. The first
    `warmup` rounds are thrown away."""
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(warmup):
            start = time.perf_counter()
            for name in order(names, -1 - r):
                timer(runs[name], r % sets)
            round_s = time.perf_counter() - start
        for r in range(budget.rounds(round_s)):
            for name in order(names, r):
                samples[name].append(timer(runs[name], r % sets))
    finally:
        if collecting:
            gc.enable()
    return samples
