"""The state of a pre-training between two steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...model import MAE
from ..checkpoints import Position
from ..sharding import all_finite, full_state_dict, is_sharded, shard_optim_state_dict, shard_state_dict

KEPT = ("weight_decay", "capturable")  # of the optimizer, by the options of the run and not by a checkpoint


@dataclass
class RunState:
    """Everything that a step changes, as a checkpoint holds it. Processes differ only in shards."""

    model: MAE
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    masks: torch.Generator  # draws the masks
    at: Position
    loss_sum: float = 0.0  # over the steps of this epoch, without those lost in a rewind
    counted: int = 0  # the number of these steps
    loss: float = math.nan  # of the last step, or the mean of an epoch just ended
    rewinds: int = 0
    init: dict[str, Any] | None = None  # the report of --init
    lr: float = field(init=False)  # of the last step; in a CUDA graph the optimizer has it as a tensor
    unreadable: dict[str, str] = field(default_factory=dict)  # unreadable images: name -> reason

    def __post_init__(self) -> None:
        self.lr = float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        self.lr = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def count(self, loss: float) -> None:
        """Add the loss of a step to the mean of its epoch."""
        self.loss_sum, self.counted, self.loss = self.loss_sum + loss, self.counted + 1, loss

    def end_epoch(self) -> None:
        self.at, self.loss_sum, self.counted = Position(self.at.epoch + 1, 0), 0.0, 0

    def is_finite(self) -> bool:
        """Return whether weights and optimizer state are finite, in this process's shard."""
        return all_finite((self.model.state_dict(), self.optimizer.state_dict()["state"]))

    def entries(self) -> dict[str, Any]:
        """Return the entries of a checkpoint. All processes must call it."""
        run = {"step": self.at.step, "masks": self.masks.get_state(), "unreadable": dict(sorted(self.unreadable.items()))}
        run |= {name: getattr(self, name) for name in ("loss_sum", "counted", "rewinds", "loss", "init")}
        optimizer = full_state_dict(self.optimizer.state_dict())
        for group in optimizer["param_groups"]:
            group["lr"] = self.lr
        model, scaler = full_state_dict(self.model.state_dict()), self.scaler.state_dict()
        return {"model": model, "optimizer": optimizer, "epoch": self.at.epoch - 1, "scaler": scaler, "run": run}

    def load(self, entries: Mapping[str, Any]) -> None:
        """Load the entries of a checkpoint. Raises ValueError if it is of another optimizer."""
        run = entries["run"]
        self.load_weights(entries)
        self.at = Position(entries["epoch"] + 1, run["step"])
        self.masks.set_state(run["masks"])
        for name in ("loss_sum", "counted", "rewinds", "loss"):
            setattr(self, name, run[name])
        self.init = run.get("init")
        self.unreadable.update(run["unreadable"] if isinstance(run["unreadable"], dict) else dict.fromkeys(run["unreadable"], ""))

    def rewind(self, entries: Mapping[str, Any]) -> None:
        """Load only the weights of `entries`; epoch and step stay the same."""
        self.load_weights(entries)
        run, same_epoch = entries["run"], entries["epoch"] + 1 == self.at.epoch
        self.loss_sum, self.counted = (run["loss_sum"], run["counted"]) if same_epoch else (0.0, 0)
        self.rewinds += 1

    def load_weights(self, entries: Mapping[str, Any]) -> None:
        """Load weights, optimizer state but for KEPT, and gradient scale."""
        weights, optimizer = entries["model"], entries["optimizer"]
        if is_sharded(self.model):
            weights = shard_state_dict(weights, self.model.state_dict())
            optimizer = shard_optim_state_dict(optimizer, self.optimizer)
        kept = [{name: group[name] for name in KEPT if name in group} for group in self.optimizer.param_groups]
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        for group, values in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(values)
        self.lr = float(optimizer["param_groups"][0]["lr"])
        if entries["scaler"]:
            self.scaler.load_state_dict(entries["scaler"])
