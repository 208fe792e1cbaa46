"""The requested backend, from MAEFAST_BACKEND (read at import) or `backend(...)`, and decisions
that are remembered for it."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from . import _apex, _flash_attn, _library, cpu, kernels

BACKENDS = ("native", "triton", "apex", "flash_attn", "sdpa", "eager")
_MOST_DECISIONS = 4096  # of one kind that are remembered

_NO_APEX = _apex.why_not("normalization", "fused_layer_norm_cuda")
_WHY_ABSENT: dict[str, Callable[[], str | None]] = {
    "native": lambda: None if _library.HAS_NATIVE else cpu.NO_NATIVE,
    "triton": lambda: None if kernels.HAS_TRITON else "Triton is not installed",
    "apex": lambda: _NO_APEX,
    "flash_attn": lambda: None if _flash_attn.RELEASE else "flash-attn is not installed",
}


class CannotRunError(RuntimeError):
    """A forced backend cannot run an op, or is not installed."""


def why_absent(backend: str) -> str | None:
    """Return None where `backend` is installed, else the reason."""
    return _WHY_ABSENT[backend]() if backend in _WHY_ABSENT else None


def checked(name: str, source: str, names: tuple[str, ...] = BACKENDS) -> str | None:
    """Return the backend that `source` requests, None for "auto". Raises ValueError for a name that
    is none, CannotRunError for a backend that is not installed."""
    if name == "auto":
        return None
    if name not in names:
        raise ValueError(f"{source} must be one of auto, {', '.join(names)}; it is {name!r}")
    if (reason := why_absent(name)) is not None:
        raise CannotRunError(f"{source} asks for {name}: {reason}")
    return name


_requested: str | None = checked(os.environ.get("MAEFAST_BACKEND", "auto"), "MAEFAST_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the backend `name` for the ops that it implements, within the block and the process.

    "auto" lets maefast choose. Raises ValueError for an unknown name, RuntimeError for a backend
    that is not installed. An op that cannot run on it raises RuntimeError with the reason.
    """
    global _requested
    before, _requested = _requested, checked(name, "backend")
    try:
        yield
    finally:
        _requested = before


def requested() -> str | None:
    """Return the backend requested for the process, or None."""
    return _requested


Decision = TypeVar("Decision")
_remembered: list[dict[Any, Any]] = []


def remembered(decide: Callable[..., Decision]) -> Callable[..., Decision]:
    """Decorate a decision that depends on its arguments and the process's request: it is cached."""
    decisions: dict[Any, Decision] = {}
    _remembered.append(decisions)

    @functools.wraps(decide)
    def recall(*facts: Any) -> Decision:
        if torch.compiler.is_compiling():
            return decide(*facts)
        key = (facts, _requested)
        try:
            decision = decisions.get(key)
        except TypeError:  # a size that is traced as a symbol has no hash
            return decide(*facts)
        if decision is None:
            if len(decisions) >= _MOST_DECISIONS:
                decisions.clear()
            decision = decisions[key] = decide(*facts)
        return decision

    return recall


def forget() -> None:
    """Clear remembered decisions: in a forked process, which may have lost its GPU, or a test."""
    for decisions in _remembered:
        decisions.clear()


os.register_at_fork(after_in_child=forget)
