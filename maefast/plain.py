"""Modules whose call may be skipped, since nobody would notice."""

from typing import TypeGuard, TypeVar

from torch import Tensor, nn

from . import _torch, ops

M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Return whether a call of `module` does what kind.forward says, and no hook would notice that
    it is not called."""
    return type(module) is kind and "forward" not in module.__dict__ and not _torch.is_hooked(module)


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """Return linear(x), by ops.linear if `linear` is a plain nn.Linear."""
    return ops.linear(x, linear.weight, linear.bias) if is_plain(linear, nn.Linear) else linear(x)
