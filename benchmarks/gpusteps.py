"""Training steps that are only measured on a GPU: fp16 with a gradient scaler, and a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maefast.testing.timing import Run
from maefast.train.step import GraphedStep


def scaled_step(loss_of: Callable[[int], Tensor], optimizer: torch.optim.Optimizer, device: torch.device) -> Run:
    """Return a step on `loss_of(i)`, a loss in fp16 autocast, as in the official recipe."""
    scaler = torch.amp.GradScaler(device.type)

    def step(i: int) -> None:
        try:
            scaler.scale(loss_of(i)).backward()
            scaler.step(optimizer)
            scaler.update()
        finally:  # also when memory runs out
            optimizer.zero_grad(set_to_none=True)

    return step


class GraphedRun:
    """GraphedStep on the input sets of a workload, imgs (sets, N, C, H, W)."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, imgs: Tensor, **options: Any):
        self.model, self.optimizer, self.imgs = model, optimizer, imgs
        self.step = GraphedStep(model, optimizer, imgs[0], **options)
        model.zero_grad()

    def __call__(self, i: int) -> Tensor:
        loss = self.step(self.imgs[i])
        self.model.zero_grad()  # other contenders share the weights and would add to these gradients
        return loss

    def losses(self) -> Tensor:
        """Return the losses of all sets, at a learning rate of 0, the mask of set i from seed i."""
        groups, losses = self.optimizer.param_groups, []
        rates = [float(group["lr"]) for group in groups]
        for group in groups:
            group["lr"] = 0.0
        for i in range(len(self.imgs)):
            torch.manual_seed(i)
            losses.append(self(i))
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        return torch.stack(losses)
