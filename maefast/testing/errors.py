"""The error rule (DESIGN.md, section 5): a result may have twice eager's error plus one eps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ZERO = 1e-13  # smaller float64 results are rounding, which is no scale for an error


def relative_errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the relative L2 error and the largest error over max|exact|; NaN for a NaN anywhere.

    Both are absolute, per element, if `exact` is zero up to rounding of values near 1.
    """
    if got.numel() == 0:
        return 0.0, 0.0
    exact = exact.detach().double()
    err = got.detach() - exact  # in float64; outputs of GELU at 1,024 images leave no room for another copy
    l2, top = exact.norm().item(), exact.norm(math.inf).item()
    if top < ZERO:
        l2, top = err.numel() ** 0.5, 1.0
    return err.norm().item() / l2, err.norm(math.inf).item() / top


def breach(got: Tensor, eager: Tensor | Sequence[Tensor], exact: Tensor) -> str | None:
    """Return how `got` breaks the rule, in one phrase, or None.

    exact     the float64 result
    eager     the eager reference's, on the same inputs in the same dtype; of runs that round
              elsewhere, the larger error
    The error of `got` may be 2 x that of `eager` + eps of its dtype, in relative L2 and in the
    largest error over max|exact|.
    """
    if exact.dtype != torch.float64:
        return f"the exact result must be float64, it is {exact.dtype}"
    runs = [eager] if isinstance(eager, Tensor) else eager
    if any(t.shape != exact.shape for t in (got, *runs)):
        return f"shapes {[tuple(t.shape) for t in (got, *runs, exact)]} differ"
    eps, errors = torch.finfo(got.dtype).eps, [relative_errors(run, exact) for run in runs]
    for kind, mine, of_runs in zip(("L2", "max"), relative_errors(got, exact), zip(*errors, strict=True), strict=True):
        theirs = max(of_runs, key=lambda error: (math.isnan(error), error))
        limit = 2 * theirs + eps
        if not (math.isfinite(mine) and mine <= limit):  # a NaN limit refuses too
            return f"relative {kind} error {mine:.3g} > {limit:.3g} = 2 x eager's {theirs:.3g} + eps {eps:.3g}"
    return None


def assert_close_to_float64(name: str, got: Tensor, eager: Tensor | Sequence[Tensor], exact: Tensor) -> None:
    """Raise AssertionError with the figures where `got` breaks the rule."""
    if (reason := breach(got, eager, exact)) is not None:
        raise AssertionError(f"{name}: {reason}")
