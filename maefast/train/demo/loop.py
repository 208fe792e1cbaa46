"""The pre-training loop, its progress bar and its log."""

import math
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..optim import adamw
from ..schedule import warmup_cosine
from ..step import training_step

PLAIN_LINES = 10  # lines of progress without a terminal
LOG_LINES = 200  # the most records of a run


class Progress:
    """A bar with loss, images/s and time left on a terminal, a few lines on stderr elsewhere."""

    def __init__(self, title: str, steps: int, batch_size: int):
        from tqdm import tqdm

        self.title, self.steps = title, steps
        self.batch_size, self.plain = batch_size, not sys.stderr.isatty()
        self.bar: Any = tqdm(total=steps * batch_size, desc=title, unit=" images", unit_scale=True, disable=self.plain)
        self.started = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def update(self, done: int, loss: float) -> None:
        """Show that `done` steps are finished, the last one with this loss."""
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update(self.batch_size)
        if self.plain and done * PLAIN_LINES // self.steps > (done - 1) * PLAIN_LINES // self.steps:
            seconds = time.perf_counter() - self.started
            rate, left = done * self.batch_size / seconds, seconds / done * (self.steps - done)
            line = f"{self.title}: step {done}/{self.steps}, loss {loss:.4f}, {rate:.0f} images/s, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)


def train_loop(
    model: nn.Module, images: Iterator[Tensor], *, title: str, steps: int, lr: float, mask_ratio: float
) -> list[dict[str, Any]]:
    """Train for `steps` steps of `adamw`, with a warm-up of a tenth of them and half a cosine.

    images   batches (N, C, H, W) uint8
    returns  at most LOG_LINES records: step (finished steps), loss (the mean since the last
             record), lr, images_per_second
    """
    optimizer = adamw(model, lr)
    every = max(1, math.ceil(steps / LOG_LINES))
    records, losses = list[dict[str, Any]](), list[float]()
    model.train()
    batch = next(images)
    with Progress(title, steps, len(batch)) as progress:
        since = time.perf_counter()
        for step in range(steps):
            rate = warmup_cosine(step, steps, steps // 10, lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses.append(training_step(model, optimizer, batch, mask_ratio, return_pred=False).item())
            if not math.isfinite(losses[-1]):
                hint = "a smaller --batch_size lowers the learning rate"
                raise UserError(f"the loss of {title} is {losses[-1]} at step {step + 1}; {hint}")
            progress.update(step + 1, losses[-1])
            if (step + 1) % every == 0 or step + 1 == steps:
                seconds = time.perf_counter() - since
                record = {"step": step + 1, "loss": sum(losses) / len(losses), "lr": rate}
                records.append(record | {"images_per_second": len(losses) * len(batch) / seconds})
                losses.clear()
                since = time.perf_counter()
            batch = next(images)
    return records
