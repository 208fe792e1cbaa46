"""Training with labels: what the linear probe and fine-tuning share."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from . import UserError
from .feed import epoch_order
from .schedule import warmup_cosine

Batches = Callable[[int, Sequence[Tensor]], Iterator[tuple[Tensor, Tensor]]]  # epoch, indices of each batch -> inputs and labels


@dataclass(frozen=True)
class Recipe:
    """How long, in what steps and at which learning rates; flags of the official launchers."""

    epochs: int
    warmup_epochs: int
    batch_size: int
    blr: float  # learning rate for 256 images a step
    weight_decay: float
    lr: float | None = None  # instead of blr * batch_size / 256
    min_lr: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0

    @property
    def peak(self) -> float:
        return self.blr * self.batch_size / 256 if self.lr is None else self.lr

    def check(self, images: int) -> None:
        """Raise UserError unless the recipe fits that many images."""
        if self.batch_size > images:
            raise UserError(f"--batch_size must be at most {images}, the number of images to train on; it is {self.batch_size}")
        if self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup_epochs must be at most --epochs, {self.epochs}; it is {self.warmup_epochs}")


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch: how many are done, the mean loss, the last learning rate."""

    epoch: int
    loss: float
    lr: float


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    images: int,
    recipe: Recipe,
    *,
    autocast: torch.dtype | None = None,
    average: AveragedModel | None = None,
) -> Iterator[Epoch]:
    """Train on the cross-entropy of model(x), (n, classes), and yield after each epoch.

    batches      reads the `images` samples, shuffled anew in each epoch; what is left after whole batches is left out
    average      updated after each step
    Order and stochastic depth follow from the seed and the epoch alone, the latter through torch's own generator.
    The learning rate, per step, is warmup_cosine's, times the `lr_scale` of a group that has one.
    Raises UserError where the recipe does not fit, and where the loss is not finite.
    """
    recipe.check(images)
    per_epoch = images // recipe.batch_size
    device, step = next(model.parameters()).device, 0
    for epoch in range(recipe.epochs):
        model.train()
        torch.manual_seed(random.Random(f"epoch {recipe.seed} {epoch}").getrandbits(63))  # stochastic depth
        order = torch.tensor(epoch_order(images, recipe.seed, epoch)[: per_epoch * recipe.batch_size])
        total, rate = torch.zeros((), device=device), 0.0
        for x, y in batches(epoch, order.split(recipe.batch_size)):
            rate = warmup_cosine(
                step, recipe.epochs * per_epoch, recipe.warmup_epochs * per_epoch, recipe.peak, min(recipe.min_lr, recipe.peak)
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
                logits = model(x.to(device))
            loss = F.cross_entropy(logits.float(), y.to(device), label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
            total += loss.detach()
            step += 1
        if not math.isfinite(mean := total.item() / per_epoch):
            raise UserError(
                f"the loss is {mean} in epoch {epoch + 1}, at a learning rate of {rate:.3g}; a smaller --blr may help"
            )
        yield Epoch(epoch + 1, mean, rate)


@torch.no_grad()
def count_correct(
    model: nn.Module, batches: Batches, images: int, *, batch_size: int = 256, autocast: torch.dtype | None = None
) -> int:
    """How many of `images` samples model(x), (n, classes), gives its greatest value at their label; it is left in eval mode."""
    model.eval()
    device, correct = next(model.parameters()).device, 0
    for x, y in batches(0, torch.arange(images).split(batch_size)):
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            logits = model(x.to(device))
        correct += int((logits.argmax(dim=1).cpu() == y).sum())
    return correct
