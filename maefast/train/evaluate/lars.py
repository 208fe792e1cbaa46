"""LARS, layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017): the optimizer of probes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum in which the step of a weight is proportional to the norm of the weight.

    params       parameters, or groups of parameters
    lr           0 by default, since schedules set it before each step
    For a parameter w of two or more dimensions with gradient g:
        d = g + weight_decay * w;  d *= trust_coefficient * |w| / |d|  (1 if either norm is 0)
    For other parameters (biases, norms) d = g. Then m = momentum * m + d, at first 0; w -= lr * m.
    Raises ValueError for a negative value.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust_coefficient": trust_coefficient}
        for name, value in defaults.items():
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more; it is {value}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; return the value of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in (p for p in group["params"] if p.grad is not None):
                d = w.grad
                if w.dim() > 1:
                    d = d.add(w, alpha=group["weight_decay"])
                    weight_norm, norm = w.norm(), d.norm()
                    trusted = group["trust_coefficient"] * weight_norm / norm
                    d = d * torch.where((weight_norm > 0) & (norm > 0), trusted, 1.0)
                state = self.state[w]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(w)
                w.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(d), alpha=group["lr"])
        return loss
