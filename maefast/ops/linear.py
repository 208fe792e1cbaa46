"""Linear: y = x W^T + b and its gradients, each on the faster GEMM of the machine.

torch sends fp32 products on x86 to MKL, which runs below its own rate on CPUs that are not Intel's (benchmarks/results, group
linear); there maefast's take over, and in bf16 where the CPU multiplies pairs of it. The rest is on the fastest one already.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch
from ._checks import check_dtype, check_floating, check_same_device, shape_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As F.linear.

    x        (..., in)   floating-point
    weight   (out, in)
    bias     (out,)
    returns  (..., out)  in the dtype of x, or under autocast in its dtype
    Under autocast the weight is cast once, in forward, and kept for backward. Gradients for x, weight and bias.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit.
    """
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floating(**given)
    check_same_device(**given)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., in) for a weight (out, in) of {shape_of(weight)}; its shape is {shape_of(x)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (out,) = ({weight.shape[0]},); its shape is {shape_of(bias)}")
    if not dispatch.is_autocast(x):
        for name, parameter in given.items():
            check_dtype(name, parameter, (x.dtype,))
    dtype = dispatch.compute_dtype(x)
    if dispatch.choose("linear", given | {"out": x.new_empty(0, dtype=dtype)}) == "native":
        return _Linear.apply(x, weight, bias, dtype)
    return linear_ref(x, weight, bias)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, native: bool, gelu: bool = False) -> Tensor:
    """linear without its gradients, for inputs of one dtype; with gelu the exact GELU of it, native fp32 in its epilogue."""
    if native:
        return torch.ops.maefast.linear_fwd(x, weight, bias, gelu)
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def input_gradient(dy: Tensor, weight: Tensor, native: bool) -> Tensor:
    """dy (..., out), weight (out, in) -> (..., in)."""
    return torch.ops.maefast.linear_fwd(dy, weight.t(), None, False) if native else dy @ weight


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, native: bool) -> Tensor:
    """dy (..., out), x (..., in) -> (out, in) in dtype; of a native product of 16 bits in fp32 without being rounded to 16."""
    dy, x = rows(dy), rows(x)
    if native:
        wide = dtype if dtype in (x.dtype, torch.float32) else x.dtype
        return torch.ops.maefast.linear_fwd(dy.t(), x.t(), None, False, wide).to(dtype)
    return (dy.t() @ x).to(dtype)


def bias_gradient(dy: Tensor) -> Tensor:
    """dy (..., out) -> (out,)."""
    return rows(dy).sum(dim=0)


def rows(t: Tensor) -> Tensor:
    """(..., D) as (rows, D)."""
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        cast_x, cast_weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(cast_x, cast_weight)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return product(cast_x, cast_weight, None if bias is None else bias.to(dtype), native=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = input_gradient(dy, weight, native=True).to(x_dtype) if ctx.needs_input_grad[0] else None
        dweight = weight_gradient(dy, x, weight_dtype, native=True) if ctx.needs_input_grad[1] else None
        dbias = bias_gradient(dy).to(bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None


@torch.library.register_fake("maefast::linear_fwd")
def _linear_fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
