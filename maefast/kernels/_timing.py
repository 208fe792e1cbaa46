"""Times of kernels on a GPU: the timer of `python -m maefast.kernels.tune` and of scripts/gpu_ops.py."""

import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import _torch

Run = Callable[[int], Any]  # of input set i


class Timer:
    """Medians in microseconds over rounds in which every contender runs once, in an order shuffled for each, on inputs that
    rotate, with a cold L2 cache. The GPU is kept busy before each sample, so that the launches are queued when it starts."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def rotate(self, runs: Mapping[str, Run], sets: int, rounds: int = 15) -> dict[str, float]:
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        for name in runs:
            for i in range(sets):
                runs[name](i)
        for r in range(rounds):
            for name in random.Random(r).sample(list(runs), len(runs)):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.flush.zero_()
                _torch.sleep_on_gpu(1_000_000)
                start.record()
                runs[name](r % sets)
                end.record()
                events[name].append((start, end))
            torch.cuda.synchronize()
        return {name: statistics.median(s.elapsed_time(e) * 1e3 for s, e in pairs) for name, pairs in events.items()}
