"""Modules whose call may be skipped, since nobody would notice."""

from typing import TypeGuard, TypeVar

from torch import Tensor, nn

from . import _torch, ops

M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Return whether a call of `module` runs kind.forward and no hook."""
    return type(module) is kind and "forward" not in module.__dict__ and not _torch.is_hooked(module)


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """Return linear(x), by ops.linear if `linear` is a plain nn.Linear with a plain weight."""
    if is_plain(linear, nn.Linear) and not _torch.has_own_rule(linear.weight):
        return ops.linear(x, linear.weight, linear.bias)
    return linear(x)
