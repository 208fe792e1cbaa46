"""Samples that were taken in rotation, replayed through pytest-benchmark."""

from typing import Any


class NotOursError(AssertionError):
    """A result outside the error rule that maefast did not compute: it is timed, and the breach noted beside the figures."""


class ReplayClock:
    """A clock for pytest-benchmark that stands still until told: it replays samples as if the target had just taken that long.

    The clock starts each round at zero, so a replayed duration is the recorded one, bit for bit.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: Any, samples: list[float]) -> None:
        """Feed `samples` through the `benchmark` fixture, whose timer is this clock (`@pytest.mark.benchmark(timer=clock)`)."""
        rest = iter(samples)

        def reset() -> None:
            self.now = 0.0

        def take() -> None:
            self.now = next(rest)

        benchmark.pedantic(take, setup=reset, rounds=len(samples), iterations=1, warmup_rounds=0)
