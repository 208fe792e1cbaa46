"""Replay of samples, which were taken in rotation, through pytest-benchmark."""

from typing import Any


class NotOursError(AssertionError):
    """A result that breaks the error rule and is not maefast's: noted, and timed all the same."""


class ReplayClock:
    """A clock for pytest-benchmark that advances by the recorded samples.

    The clock starts each round at zero, so a replayed duration is the recorded one, bit for bit.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: Any, samples: list[float]) -> None:
        """Feed `samples` through the `benchmark` fixture, whose timer must be this clock."""
        rest = iter(samples)

        def reset() -> None:
            self.now = 0.0

        def take() -> None:
            self.now = next(rest)

        benchmark.pedantic(take, setup=reset, rounds=len(samples), iterations=1, warmup_rounds=0)
