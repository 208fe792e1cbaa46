"""The losses of a run, read from the device when that does not keep it waiting."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..checkpoints import Position
from ..errors import UserError
from ..step import read_later
from .report import Report
from .saver import Saver
from .state import RunState

# The number of steps after which a loss is read: one on a GPU, so that the GPU never waits.
LAG = {"cpu": 0, "cuda": 1}


class Losses:
    """The losses of steps that have not been read yet, oldest first."""

    def __init__(self, state: RunState, saver: Saver, report: Report, steps_per_epoch: int):
        self.state, self.saver, self.report, self.steps_per_epoch = state, saver, report, steps_per_epoch
        self.unread = list[tuple[Callable[[], Any], Position, float]]()  # loss, position and learning rate of steps
        self.valueless = 0  # steps since the last one that had a loss

    def add(self, loss_and_share: Tensor, rate: float) -> bool:
        """Add the loss of a step, a sum over batches, and the share of batches that have one. Read
        the losses that are due, as `read` does."""
        self.unread.append((read_later(loss_and_share), self.state.at, rate))
        return self.read(LAG[loss_and_share.device.type])

    def read(self, keep: int = 0) -> bool:
        """Read the losses of all but the last `keep` steps; return False if one led to a rewind."""
        while len(self.unread) > keep:
            read, at, rate = self.unread.pop(0)
            total, share = read()
            if share == 0 == total:
                self._skip_step(at, rate)
                continue
            loss, self.valueless = total / share if share else total, 0
            self.report.step(at.epoch, loss, rate)
            if not math.isfinite(loss):
                self.report.done += len(self.unread)  # steps with broken weights
                self.unread.clear()
                self.saver.rewind(self.state, self.report, f"loss is {loss}", at, rate)
                return False
            self.state.count(loss)
        return True

    def _skip_step(self, at: Position, rate: float) -> None:
        """Report a step of batches without values. Raises UserError after an epoch of them."""
        self.report.step(at.epoch, self.state.loss, rate)
        self.valueless += 1
        if self.valueless == self.steps_per_epoch:
            what = f"the removed patches of {self.valueless} steps have none"
            raise UserError(f"--data_path must hold patches without missing values; {what}")
