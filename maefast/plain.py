"""Modules whose call may be skipped, since nobody would notice."""

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from . import _torch, ops

M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Return whether a call of `module` does what kind.forward says, and no hook would notice that
    it is not called."""
    return type(module) is kind and "forward" not in module.__dict__ and not _torch.is_hooked(module)


def has_own_rule(weight: Tensor) -> bool:
    """Return whether `weight` is of a class with a __torch_function__ of its own, as quantised
    weights of torchao are: only torch's functions, F.linear among them, ask for it."""
    kind = type(weight)
    return kind not in (Tensor, nn.Parameter) and kind.__torch_function__ is not torch._C._disabled_torch_function_impl


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """Return linear(x), by ops.linear if `linear` is a plain nn.Linear with a plain weight."""
    if is_plain(linear, nn.Linear) and not has_own_rule(linear.weight):
        return ops.linear(x, linear.weight, linear.bias)
    return linear(x)
