"""Fit the polynomials of csrc/cuda/gemm/gelu.h and print them with their errors.

    python scripts/fit_gelu.py

Needs numpy and scipy. Each is a minimax fit, found as a linear program, with a fixed value at the
end of the interval.
"""

from collections.abc import Callable

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial
from scipy.optimize import linprog
from scipy.special import ndtr

Function = Callable[[np.ndarray], np.ndarray]
POINTS = 3000
PAST = 1.2e-7  # beyond 0 and 1 at the ends, so that fp32 arithmetic that saturates gives 0 and 1 there


def density(v: np.ndarray) -> np.ndarray:
    return np.exp(-v * v / 2) / np.sqrt(2 * np.pi)


def slope(v: np.ndarray) -> np.ndarray:
    return ndtr(v) + v * density(v)


def fit(function: Function, weight: Function, degree: int, end: float, scale: float, past: float = 0.0) -> np.ndarray:
    """Return the coefficients of P, lowest first, where function(v) = 0.5 + c P(c^2 - b^2 / 2) with
    c = scale v in [0, b], b = scale end.

    The error is weighted by `weight`; the sum is 1 + past at c = b, so that it is -past at -b.
    """
    v = end * np.sin(np.linspace(1e-4, np.pi / 2, POINTS))  # dense near the end
    c, half = scale * v, (scale * end) ** 2 / 2
    basis = weight(v)[:, None] * c[:, None] * np.polynomial.chebyshev.chebvander((c * c - half) / half, degree)
    target = weight(v) * (function(v) - 0.5)
    bound = -np.ones((POINTS, 1))
    at_end = np.append(np.full(degree + 1, scale * end), 0.0)[None]  # every Chebyshev polynomial is 1 at 1
    solution = linprog(
        np.eye(degree + 2)[-1],
        A_ub=np.block([[basis, bound], [-basis, bound]]),
        b_ub=np.concatenate([target, -target]),
        A_eq=at_end,
        b_eq=[0.5 + past],
        bounds=(None, None),
    )
    chebyshev = Chebyshev(solution.x[:-1], domain=[-half, half])
    return chebyshev.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef


def fma(a: np.ndarray, b: np.ndarray, c: np.float32) -> np.ndarray:
    return (a.astype(np.float64) * b.astype(np.float64) + np.float64(c)).astype(np.float32)


def evaluate(coefficients: np.ndarray, v: np.ndarray, end: float, scale: float) -> np.ndarray:
    """0.5 + c P, in fp32 as the kernels do it."""
    c = np.clip(v * np.float32(scale), np.float32(-scale * end), np.float32(scale * end))
    w = fma(c, c, np.float32(-((scale * end) ** 2) / 2))
    p = np.full_like(w, np.float32(coefficients[-1]))
    for coefficient in coefficients[-2::-1]:
        p = fma(p, w, np.float32(coefficient))
    return fma(p, c, np.float32(0.5))


def show(name: str, coefficients: np.ndarray, error: np.ndarray) -> None:
    print(f"{name}: {{{', '.join(f'{value:.9g}f' for value in coefficients.astype(np.float32)[::-1])}}}")
    print(f"  largest error {np.abs(error).max():.2e}")


def main() -> None:
    v = np.linspace(-30, 30, 4_000_001).astype(np.float32)
    exact = v.astype(np.float64)
    end = 4.375
    cdf = fit(ndtr, lambda v: v, 8, end, 1.0, PAST)
    y = np.maximum(v, np.float32(-end)) * np.clip(evaluate(cdf, v, end, 1.0), 0, 1)
    show("v cdf(v)", cdf, y - exact * ndtr(exact))
    print("  cdf at the ends", *evaluate(cdf, v[[0, -1]], end, 1.0))
    end = 4.5625
    gradient = fit(slope, np.ones_like, 9, end, 1 / end)
    values = evaluate(gradient, v, end, 1 / end)
    show("slope", gradient, values - slope(exact))
    print("  slope at the ends", values[0], values[-1])


if __name__ == "__main__":
    main()
