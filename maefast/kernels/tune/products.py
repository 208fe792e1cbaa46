"""Timing of maefast/gemm.py's products, and table entries."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import gemm, kernels
from ...tuned import Gemm
from .timed import GAIN, SETS, Setting, is_right

# rows of a step, width: decoder; encoders B, L, H
_BLOCKS = ((201_728, 512), (51_200, 768), (25_600, 1024), (16_640, 1280))
_CHECKED_ROWS = 392


class Size(NamedTuple):
    rows: int
    depth: int
    features: int


Timed = tuple[str, Size, Mapping[str, float]]  # kind, size, time of "cublas" and of "cutlass"
Contender = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]  # x, weight, bias, hidden


def product_sizes(kind: str) -> tuple[Size, ...]:
    """Return the products of a kind in the blocks of ViT-B, -L and -H."""
    shapes = ((1, 4),) if "gelu" in kind else ((1, 1), (1, 3), (1, 4), (4, 1))
    return tuple(Size(rows, width * a, width * b) for rows, width in _BLOCKS for a, b in shapes)


def _gelu(hidden: Tensor) -> Tensor:
    return torch.ops.maefast_triton.bias_gelu_fwd(hidden, None) if kernels.HAS_TRITON and hidden.is_cuda else F.gelu(hidden)


def _gelu_gradient(dy: Tensor, hidden: Tensor) -> Tensor:
    if kernels.HAS_TRITON and hidden.is_cuda:
        return torch.ops.maefast_triton.bias_gelu_bwd(dy, hidden, None, False)[0]
    return torch.ops.aten.gelu_backward(dy, hidden)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    h = F.linear(x, weight, bias)
    return _gelu(h), h


def _separate_sum(x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    dx, _ = torch.ops.maefast.linear_gelu_bwd(x, weight, hidden)
    return dx, dx.sum(0, dtype=torch.float32)


_CUBLAS: dict[str, Contender] = {
    "linear": lambda x, weight, bias, hidden: (F.linear(x, weight, bias),),
    "input_gradient": lambda x, weight, bias, hidden: (x @ weight,),
    "linear_gelu_fwd": _linear_gelu,
    "linear_gelu_bwd": lambda x, weight, bias, hidden: (_gelu_gradient(x @ weight, hidden),),
    "linear_gelu_bwd_sum": _separate_sum,  # only asked for if linear_gelu_bwd is faster than cuBLAS
}
_CUTLASS: dict[str, Contender] = {
    "linear": lambda x, weight, bias, hidden: (torch.ops.maefast.linear_fwd(x, weight, bias, False),),
    "input_gradient": lambda x, weight, bias, hidden: (torch.ops.maefast.linear_fwd(x, weight.t(), None, False),),
    "linear_gelu_fwd": lambda x, weight, bias, hidden: torch.ops.maefast.linear_gelu_fwd(x, weight, bias),
    "linear_gelu_bwd": lambda x, weight, bias, hidden: torch.ops.maefast.linear_gelu_bwd(x, weight, hidden)[:1],
    "linear_gelu_bwd_sum": lambda x, weight, bias, hidden: torch.ops.maefast.linear_gelu_bwd(x, weight, hidden, True),
}


def plain(kind: str, x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    """Return the results of a kind by torch's own ops, in the dtype of x."""
    y = F.linear(x, weight, bias) if kind in gemm.FORWARD else x @ weight
    if kind == "linear_gelu_fwd":
        return F.gelu(y), y
    if kind in ("linear", "input_gradient"):
        return (y,)
    dx = torch.ops.aten.gelu_backward(y, hidden)
    return (dx,) if kind == "linear_gelu_bwd" else (dx, dx.sum(0, dtype=torch.promote_types(dx.dtype, torch.float32)))


def inputs(kind: str, size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return x, weight, bias, hidden."""
    rows, depth, features = size
    weight = (features, depth) if kind in gemm.FORWARD else (depth, features)
    shapes = ((rows, depth), weight, (features,), (rows, features))
    x, w, b, h = (torch.randn(shape, device=device) for shape in shapes)
    return tuple(t.to(dtype) for t in (x, w / math.sqrt(depth), b, h))


def time_product(kind: str, size: Size, setting: Setting) -> dict[str, float]:
    """Return the time of "cublas", and of "cutlass" if it can run and its result is right."""
    device, dtype = setting.device, setting.half
    contenders = {"cublas": _CUBLAS[kind], "cutlass": _CUTLASS[kind]}
    small = inputs(kind, size._replace(rows=_CHECKED_ROWS), device, dtype)
    eager, exact = plain(kind, *small), plain(kind, *(t.double() for t in small))
    reason = gemm.why_not(kind, small[0], small[1], dtype)
    if reason is None and not is_right(_CUTLASS[kind](*small), eager, exact):
        reason = "its results are outside the error rule"
    if reason is not None:
        print(f"{kind} of {size.depth} to {size.features} without CUTLASS: {reason}")
        return {}
    sets = [inputs(kind, size, device, dtype) for _ in range(SETS)]
    return setting.rotate({name: lambda i, run=run: run(*sets[i]) for name, run in contenders.items()}, SETS)  # type: ignore[misc]


def product_entries(timed: Iterable[Timed], capability: str, measured: str) -> tuple[Gemm, ...]:
    """Return the entries of products that are at least GAIN faster than cuBLAS.

    An entry covers depths and features from two thirds of those that were measured, but no other
    measured ones, and rows from two thirds of the fewest that were measured for its kind.
    """
    rows = [row for row in timed if row[2]]
    found = []
    for kind, size, times in rows:
        mine = [other for other_kind, other, _ in rows if other_kind == kind]
        depths = {other.depth for other in mine}
        features = {other.features for other in mine if other.depth == size.depth}
        speedup = times["cublas"] / times["cutlass"]
        if speedup >= GAIN:
            found.append(
                Gemm(
                    capability,
                    kind,
                    (_first(size.depth, depths), size.depth),
                    (_first(size.features, features), size.features),
                    2 * min(other.rows for other in mine) // 3,
                    math.floor(speedup * 100) / 100,
                    measured,
                )
            )
    return tuple(found)


def _first(value: int, measured: Iterable[int]) -> int:
    """Return the first value of the range that ends at `value`."""
    return max([-(-2 * value // 3), *(other + 1 for other in measured if other < value)])
