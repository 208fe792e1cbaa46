"""AdamW with the parameter groups of the paper's recipe."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _apex

BACKENDS = ("auto", "apex", "torch")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups of trainable parameters; those of one dimension get no weight decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def adamw(
    params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.05,
    eps: float = 1e-8,
    *,
    backend: str = "auto",
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """Return apex's FusedAdam if it is installed and can run on CUDA, else torch's fused AdamW.

    params      a model (its `parameter_groups`), parameters, or groups of parameters
    backend     "auto", "apex" or "torch"; a state_dict of one does not fit the other
    capturable  for CUDA graphs, as `maefast.train.step.GraphedStep` needs it; only torch's AdamW
    Raises ValueError for an unknown backend, RuntimeError if "apex" is forced and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; it is {backend!r}")
    groups: list[Any] = parameter_groups(params, weight_decay) if isinstance(params, nn.Module) else list(params)
    reason = None if backend == "torch" else _why_not_apex(groups, capturable)
    if backend == "apex" and reason is not None:
        raise RuntimeError(f"adamw cannot run on the requested backend 'apex': {reason}")
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if backend == "torch" or reason is not None:
        return torch.optim.AdamW(groups, **options, fused=True, capturable=capturable)
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, **options, adam_w_mode=True)


def _why_not_apex(groups: list[Any], capturable: bool) -> str | None:
    if (reason := _apex.why_not("optimizers", "amp_C")) is not None:
        return reason
    if capturable:
        return "capturable is for torch's AdamW"
    parameters = [p for group in groups for p in (group["params"] if isinstance(group, dict) else (group,))]
    if (elsewhere := next((p for p in parameters if not p.is_cuda), None)) is not None:
        return f"apex's FusedAdam takes parameters on CUDA, one is on {elsewhere.device}"
    return None
