"""The progress of a run: a bar on a terminal, lines elsewhere."""

import resource
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from signal import Signals
from typing import Any

import torch

LINES_APART = 30.0  # seconds between lines without a terminal


class Report:
    """Speed and loss of a run of `steps` optimizer steps of `images` images each.

    done   steps of an earlier process
    quiet  print nothing, since another process of the run prints
    """

    def __init__(self, steps: int, done: int, images: int, device: torch.device, quiet: bool = False):
        self.steps, self.done, self.first, self.images, self.device, self.quiet = steps, done, done, images, device, quiet
        self.waited = 0.0  # seconds without a batch
        self.started = self.last_line = time.perf_counter()
        self.bar: Any = None
        if not quiet and sys.stderr.isatty() and find_spec("tqdm") is not None:
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=done, unit=" steps", desc="pretrain")

    def step(self, epoch: int, loss: float, lr: float) -> None:
        """Count a finished step."""
        self.done += 1
        if self.bar is not None:
            figures = self.figures()
            speed = {"images/s": f"{figures['images_per_second']:.0f}", "wait": f"{figures['data_wait']:.0%}"}
            self.bar.set_postfix(epoch=epoch, loss=f"{loss:.4f}", lr=f"{lr:.2e}", **speed, refresh=False)
            self.bar.update()
        elif time.perf_counter() - self.last_line >= LINES_APART:
            self.line(f"epoch {epoch}, step {self.done}/{self.steps}", loss, lr)

    def line(self, title: str, loss: float, lr: float) -> None:
        """Print a line, above the bar if there is one."""
        figures = self.figures()
        left = figures["seconds"] / max(1, self.done - self.first) * (self.steps - self.done)
        cost = f"{_speed(figures)}, {figures['memory_gib']:.2f} GiB, {left:.0f} s left"
        self.say(f"{title}: loss {loss:.4f}, lr {lr:.3g}, {cost}")
        self.last_line = time.perf_counter()

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        elif not self.quiet:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        if not self.quiet:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def figures(self) -> dict[str, float]:
        """Return images_per_second, data_wait (the share of the time), memory_gib (the peak) and
        seconds of this process so far."""
        seconds = time.perf_counter() - self.started
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        speed = (self.done - self.first) * self.images / seconds
        return {"images_per_second": speed, "data_wait": self.waited / seconds, "memory_gib": memory, "seconds": seconds}

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def conclude(summary: Mapping[str, Any]) -> None:
    """Print the summary of a run."""
    how = "done" if summary["finished"] else f"stopped by {Signals(summary['signal']).name}, --resume auto resumes it"
    cost = f"{summary['seconds']:.0f} s, {_speed(summary)}"
    print(f"{how}: {summary['steps']} steps, loss {summary['loss']:.4f}, {cost}", flush=True)
    if summary["unreadable"]:
        print(f"{summary['unreadable']} unreadable images skipped", flush=True)
    if rewinds := summary["rewinds"]:
        print(f"rewound {rewinds} {'time' if rewinds == 1 else 'times'} after a loss that was not finite", flush=True)
    print(f"checkpoint: {summary['checkpoint']}", flush=True)


def _speed(figures: Mapping[str, Any]) -> str:
    return f"{figures['images_per_second']:.0f} images/s, {figures['data_wait']:.0%} of the time waiting for data"
