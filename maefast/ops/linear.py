"""Linear: y = x W^T + b and its gradients, each on the faster GEMM of the machine.

On non-Intel CPUs with AVX-512, MKL's fp32 GEMM and oneDNN's in bf16 run below the CPU's rate, and
maefast's own is faster (benchmarks/results, group linear).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import cpu, dispatch, gemm, request
from ..autocast import compute_dtype, is_autocast
from ..dispatch import Kernel, Op
from ._checks import check_dtype, check_floating, check_same_device, shape_of

_MANY_ROWS = 256  # from here on the gradient of a weight costs more arithmetic than memory


class LinearAsk(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    x: torch.dtype
    weight: torch.dtype
    bias: torch.dtype | None
    out: torch.dtype  # that the products run in


def _why_slow(ask: LinearAsk) -> str | None:
    """Return why torch's own products are as fast (figures: benchmarks/results, group linear)."""
    if cpu.IS_INTEL:
        return "torch's own products, MKL's and oneDNN's, are at home on Intel"
    if (ask.out == torch.float32 and cpu.has_avx512()) or (ask.out == torch.bfloat16 and cpu.multiplies_bf16()):
        return None
    return f"torch's own product is as fast in {dispatch.names_of((ask.out,))} on this CPU"


KERNELS = (Kernel("native", ("cpu",), why_slow=_why_slow),)
AUTO = {"cpu": ("native",)}
OP = Op("linear", KERNELS, AUTO, lambda device, dtype: LinearAsk(device, dtype, dtype, dtype, dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear.

    x        (..., in)   floating-point
    weight   (out, in)
    bias     (out,)
    returns  (..., out)  in the dtype of x, or under autocast in its dtype
    Under autocast the weight is cast once, in forward, and kept for backward. Gradients for x,
    weight and bias. Raises TypeError or ValueError when shapes, dtypes or devices do not fit.
    """
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floating(**given)
    check_same_device(**given)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., in) for a weight (out, in) of {shape_of(weight)}; its shape is {shape_of(x)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (out,) = ({weight.shape[0]},); its shape is {shape_of(bias)}")
    if not is_autocast(x.device, x.dtype):
        for name, parameter in given.items():
            check_dtype(name, parameter, (x.dtype,))
    dtype = compute_dtype(x)
    native = native_products(LinearAsk(x.device, x.dtype, weight.dtype, None if bias is None else bias.dtype, dtype))
    if native.forward or is_fused("linear", x, weight, native, dtype):
        return _Linear.apply(x, weight, bias, dtype, native)
    return linear_ref(x, weight, bias)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


class Products(NamedTuple):
    """The matrix products of a Linear that are maefast's."""

    forward: bool
    input_gradient: bool
    weight_gradient: int | None  # from so many rows on; backward compares, so forward exports
    on_gpu: bool = False  # whether is_fused may be true


@request.remembered
def native_products(ask: LinearAsk) -> Products:
    """Return which products are maefast's. Unless forced, torch keeps those it is faster at: the
    gradient for a bf16 input, and for the weight of few rows."""
    if ask.device.type == "cuda":
        return Products(False, False, None, gemm.HAS_KERNELS and dispatch.request_for(OP, ask.device) != "eager")
    if dispatch.choose(OP, ask) != "native":
        return Products(False, False, None)
    if dispatch.request_for(OP, ask.device) is not None:
        return Products(True, True, 0)
    return Products(True, ask.out != torch.bfloat16, _MANY_ROWS)


def is_fused(kind: str, x: Tensor, weight: Tensor, native: Products, dtype: torch.dtype | None = None) -> bool:
    """Return whether a GPU runs a product of a kind of maefast/gemm.py as a kernel of maefast."""
    return native.on_gpu and gemm.is_faster(kind, x, weight, dtype or x.dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, native: Products, gelu: bool = False) -> Tensor:
    """Compute linear without gradients, for inputs of one dtype; `gelu` adds exact GELU."""
    if native.forward or is_fused("linear_gelu_fwd" if gelu else "linear", x, weight, native):
        return torch.ops.maefast.linear_fwd(x, weight, bias, gelu)
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def input_gradient(dy: Tensor, weight: Tensor, native: Products) -> Tensor:
    """Return dx: dy (..., out), weight (out, in) -> (..., in)."""
    if native.input_gradient or is_fused("input_gradient", dy, weight, native):
        return torch.ops.maefast.linear_fwd(dy, weight.t(), None, False)
    return dy @ weight


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, native: Products) -> Tensor:
    """Return dw: dy (..., out), x (..., in) -> (out, in) in dtype. Native products and a GPU store
    16-bit products in fp32 unrounded."""
    dy, x = rows(dy), rows(x)
    if x.is_cuda and dtype == torch.float32 != x.dtype:
        return torch.mm(dy.t(), x, out_dtype=dtype)
    if native.weight_gradient is not None and dy.shape[0] >= native.weight_gradient:
        wide = dtype if dtype in (x.dtype, torch.float32) else x.dtype
        return torch.ops.maefast.linear_fwd(dy.t(), x.t(), None, False, wide).to(dtype)
    return (dy.t() @ x).to(dtype)


def bias_gradient(dy: Tensor) -> Tensor:
    """Return the bias's gradient: dy (..., out) -> (out,)."""
    return rows(dy).sum(dim=0)


def rows(t: Tensor) -> Tensor:
    """Return (..., D) as (rows, D)."""
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, native: Products) -> Tensor:
        cast_x, cast_weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(cast_x, cast_weight)
        ctx.dtypes, ctx.native = (x.dtype, weight.dtype, None if bias is None else bias.dtype), native
        return product(cast_x, cast_weight, None if bias is None else bias.to(dtype), native)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        native = ctx.native
        dx = input_gradient(dy, weight, native).to(x_dtype) if ctx.needs_input_grad[0] else None
        dweight = weight_gradient(dy, x, weight_dtype, native) if ctx.needs_input_grad[1] else None
        dbias = bias_gradient(dy).to(bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None


@torch.library.register_fake("maefast::linear_fwd")
def _linear_fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


@torch.library.register_fake("maefast::linear_gelu_fwd")
def _linear_gelu_fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    sizes = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(sizes), x.new_empty(sizes)


@torch.library.register_fake("maefast::linear_gelu_bwd")
def _linear_gelu_bwd_fake(dy: Tensor, weight: Tensor, hidden: Tensor, with_sum: bool = False) -> tuple[Tensor, Tensor]:
    features = weight.shape[1]
    return dy.new_empty(*dy.shape[:-1], features), dy.new_empty(features if with_sum else 0, dtype=torch.float32)
