"""Training with labels, for the linear probe and fine-tuning."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..data.labelled import Batches
from ..data.order import epoch_order
from ..errors import UserError
from ..schedule import warmup_cosine


class Diverged(UserError):  # noqa: N818 - like UserError's, its text is for the user
    """The loss is not finite."""


@dataclass(frozen=True)
class Recipe:
    """Epochs, batch sizes and learning rates, with the names of the official flags."""

    epochs: int
    warmup_epochs: int
    batch_size: int
    blr: float  # learning rate for 256 images per step
    weight_decay: float
    lr: float | None = None  # overrides blr * batch_size * accum_iter / 256
    min_lr: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0
    accum_iter: int = 1  # batches per step
    clip_grad: float | None = None  # greatest norm of the gradient

    @property
    def step_size(self) -> int:
        return self.batch_size * self.accum_iter

    @property
    def peak(self) -> float:
        return self.blr * self.step_size / 256 if self.lr is None else self.lr

    def check(self, images: int) -> None:
        """Raise UserError unless the recipe fits this number of images."""
        if self.step_size > images:
            what = "--batch_size" if self.accum_iter == 1 else "--batch_size x --accum_iter"
            raise UserError(f"{what} must be at most {images}, the number of images to train on; it is {self.step_size}")
        if self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup_epochs must be at most --epochs, {self.epochs}; it is {self.warmup_epochs}")


@dataclass(frozen=True)
class Epoch:
    """An epoch's result: number of finished epochs, mean loss, last learning rate."""

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
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    start: int = 0,
) -> Iterator[Epoch]:
    """Train on the cross-entropy of model(x), (n, classes), and yield after each epoch.

    batches      reads the `images` samples in a new order each epoch, without an incomplete step
    average      is updated after each step
    change       maps inputs and labels (n,) to inputs and labels or probabilities (n, classes)
    start        the number of epochs that are done already
    The order and the draws of torch's global generator depend only on the seed and the epoch. The
    learning rate is warmup_cosine's, times `lr_scale` of the group, if any.
    Raises UserError if the recipe does not fit, and Diverged if the loss is not finite.
    """
    recipe.check(images)
    per_epoch = images // recipe.step_size
    device, steps = next(model.parameters()).device, recipe.epochs * per_epoch
    for epoch in range(start, recipe.epochs):
        model.train()
        torch.manual_seed(random.Random(f"epoch {recipe.seed} {epoch}").getrandbits(63))
        order = torch.tensor(epoch_order(images, recipe.seed, epoch)[: per_epoch * recipe.step_size])
        total, rate = torch.zeros((), device=device), 0.0
        for number, (x, y) in enumerate(batches(epoch, order.split(recipe.batch_size))):
            x, y = x.to(device), y.to(device)
            if change is not None:
                x, y = change(x, y)
            with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing) / recipe.accum_iter
            loss.backward()
            total += loss.detach()
            if (number + 1) % recipe.accum_iter:
                continue
            step = epoch * per_epoch + number // recipe.accum_iter
            rate = warmup_cosine(step, steps, recipe.warmup_epochs * per_epoch, recipe.peak, min(recipe.min_lr, recipe.peak))
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            if recipe.clip_grad is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update_parameters(model)
        if not math.isfinite(mean := total.item() / per_epoch):
            raise Diverged(f"the loss is {mean} in epoch {epoch + 1}, at a learning rate of {rate:.3g}; a smaller --blr may help")
        yield Epoch(epoch + 1, mean, rate)


@torch.no_grad()
def count_correct(
    model: nn.Module, batches: Batches, images: int, *, batch_size: int = 256, autocast: torch.dtype | None = None
) -> int:
    """Return how many of `images` samples model(x), (n, classes), classifies correctly."""
    model.eval()
    device, correct = next(model.parameters()).device, 0
    for x, y in batches(0, torch.arange(images).split(batch_size)):
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            logits = model(x.to(device))
        correct += int((logits.argmax(dim=1).cpu() == y).sum())
    return correct


def in_memory(inputs: Tensor, labels: Tensor) -> Batches:
    return lambda epoch, batches: ((inputs[ids], labels[ids]) for ids in batches)
