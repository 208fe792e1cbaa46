"""The one error rule of tests and benchmarks: a result may be off by twice what the eager reference is off by, plus one eps."""

import math

import torch
from torch import Tensor

ZERO = 1e-13  # what is all smaller in float64 is a zero, and its rounding is no scale for an error


def relative_errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the relative L2 error and the largest error over the largest |exact|; NaN for a NaN anywhere.

    Both are absolute, per element, where `exact` is zero up to the rounding of float64: of values near 1, as the tests have them.
    """
    if got.numel() == 0:
        return 0.0, 0.0
    exact = exact.detach().double()
    err = got.detach().double() - exact
    l2, top = exact.norm().item(), exact.abs().max().item()
    if top < ZERO:
        l2, top = err.numel() ** 0.5, 1.0
    return err.norm().item() / l2, err.abs().max().item() / top


def assert_close_to_float64(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Hold `got` against the float64 result `exact`: at most 2 x the error of `eager` (same inputs and dtype) + eps of got.dtype.

    Both in relative L2 and in the largest absolute error over max|exact|. Raises AssertionError with the figures.
    """
    assert exact.dtype == torch.float64, f"{name}: the exact result must be float64, it is {exact.dtype}"
    assert got.shape == eager.shape == exact.shape, f"{name}: shapes {[tuple(t.shape) for t in (got, eager, exact)]} differ"
    eps = torch.finfo(got.dtype).eps
    for kind, mine, theirs in zip(("L2", "max"), relative_errors(got, exact), relative_errors(eager, exact), strict=True):
        limit = 2 * theirs + eps
        ok = math.isfinite(mine) and mine <= limit  # a NaN limit refuses too
        assert ok, f"{name}: relative {kind} error {mine:.3g} > {limit:.3g} = 2 x eager's {theirs:.3g} + eps {eps:.3g}"
