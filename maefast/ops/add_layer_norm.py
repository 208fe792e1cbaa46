"""Add + layer norm: a branch added to the residual stream and the sum normalised, in one pass."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch, kernels
from .._library import register_fake
from ..dispatch import Kernel, Op
from ._checks import check_floating, check_out_dtype, check_rows, check_same_device, shape_of

MAX_WIDTH = 8192  # of a row that Triton's kernel holds in registers


class AddNormAsk(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    x: torch.dtype
    residual: torch.dtype
    weight: torch.dtype
    bias: torch.dtype
    out: torch.dtype
    width: int


def _why_not_triton(ask: AddNormAsk) -> str | None:
    if ask.width > MAX_WIDTH:
        return f"triton add_layer_norm takes rows of up to {MAX_WIDTH} values, x has {ask.width}"
    return None


KERNELS = (Kernel("native", ("cpu",)), Kernel("triton", kernels.DEVICES, why_not=_why_not_triton))
AUTO = {"cpu": ("native",), "cuda": ("triton",)}
OP = Op("add_layer_norm", KERNELS, AUTO, lambda device, dtype: AddNormAsk(device, dtype, dtype, dtype, dtype, dtype, width=768))


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return the layer norm of x + residual, and the sum: the step between two branches of a block.

    x             (..., D)  floating-point, a branch's output
    residual      (..., D)  floating-point, of any dtype
    weight, bias  (D,)      floating-point, of any dtype
    dtype                   of the normalised sum; by default that of the sum
    returns       (..., D), (..., D)  the normalised sum, with the statistics of the sum as stored,
                            and the sum, in the promoted dtype of x and residual
    Gradients for x, residual, weight and bias, deterministic.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit.
    """
    check_rows(x, weight=weight, bias=bias)
    check_floating(residual=residual)
    check_same_device(x=x, residual=residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {shape_of(x)}; its shape is {shape_of(residual)}")
    dtype = check_out_dtype(dtype, torch.promote_types(x.dtype, residual.dtype))
    ask = AddNormAsk(x.device, x.dtype, residual.dtype, weight.dtype, bias.dtype, dtype, x.shape[-1])
    backend = dispatch.choose(OP, ask)
    if backend != "eager":
        return _AddLayerNorm.apply(backend, x, residual, weight, bias, eps, dtype)
    return add_layer_norm_ref(x, residual, weight, bias, eps, dtype)


def add_layer_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total = x + residual
    wide = torch.promote_types(total.dtype, torch.float32)
    return F.layer_norm(total.to(wide), total.shape[-1:], weight.to(wide), bias.to(wide), eps).to(dtype), total


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y, total, center, rstd = dispatch.ops_of(backend).add_layer_norm_fwd(x, residual, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight, bias, center, rstd)
        ctx.backend, ctx.x_dtype, ctx.residual_dtype = backend, x.dtype, residual.dtype
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias, center, rstd = ctx.saved_tensors
        _, needs_x, needs_residual, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if dy is None:  # only the sum was used
            dx = None if dtotal is None or not needs_x else dtotal.to(ctx.x_dtype)
            dresidual = None if dtotal is None or not needs_residual else dtotal.to(ctx.residual_dtype)
            return None, dx, dresidual, None, None, None, None
        # both differ from the sum only as fp16 and bf16, of which one is cast by itself
        cast = next((dtype for dtype in (ctx.x_dtype, ctx.residual_dtype) if dtype != total.dtype), None)
        dsum, dweight, dbias, _, dsum_cast, _ = dispatch.ops_of(ctx.backend).layer_norm_bwd(
            dy, dtotal, total, weight, bias, center, rstd, None, cast
        )
        dx, dresidual = (dsum_cast if dtype == cast else dsum.to(dtype) for dtype in (ctx.x_dtype, ctx.residual_dtype))
        dweight, dbias = dweight.to(weight.dtype) if needs_weight else None, dbias.to(bias.dtype) if needs_bias else None
        return None, dx if needs_x else None, dresidual if needs_residual else None, dweight, dbias, None, None


@register_fake("add_layer_norm_fwd")
def _add_layer_norm_fwd_fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    statistic = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), total, statistic, torch.empty_like(statistic)
