"""Layer norm: each row normalised by its own mean and variance, written in the dtype that the next layer reads."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch
from .._library import register_fake
from ._checks import check_out_dtype, check_rows


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, biased variance, statistics in fp32 or wider.

    x             (..., D)  floating-point
    weight, bias  (D,)      floating-point, of any dtype
    dtype                   of the result; by default that of x
    returns       (..., D)
    Gradients for x, weight and bias, deterministic.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit.
    """
    check_rows(x, weight=weight, bias=bias)
    dtype = check_out_dtype(dtype, x.dtype)
    inputs = {"x": x, "weight": weight, "bias": bias, "out": x.new_empty(0, dtype=dtype)}
    backend = dispatch.choose("layer_norm", inputs)
    if backend == "apex":
        return _by_apex(x, weight, bias, eps, dtype)
    if backend != "eager":
        return _LayerNorm.apply(backend, x, weight, bias, eps, dtype)
    return layer_norm_ref(x, weight, bias, eps, dtype)


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(dtype)


def _by_apex(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    with torch.autocast("cuda", enabled=False):  # apex would round x to autocast's dtype before the statistics
        return fused_layer_norm_affine(x, weight, bias, x.shape[-1:], eps).to(dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, center, rstd = dispatch.ops_of(backend).layer_norm_fwd(x, weight, bias, eps, dtype)
        ctx.backend = backend
        ctx.save_for_backward(x, weight, bias, center, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, center, rstd = ctx.saved_tensors
        kernels = dispatch.ops_of(ctx.backend)
        dx, dweight, dbias, *_ = kernels.layer_norm_bwd(dy, None, x, weight, bias, center, rstd, None, None)
        _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        return (
            None,
            dx if needs_x else None,
            dweight.to(weight.dtype) if needs_weight else None,
            dbias.to(bias.dtype) if needs_bias else None,
            None,
            None,
        )


@register_fake("layer_norm_fwd")
def _layer_norm_fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    statistic = x.new_empty(rows, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), statistic, torch.empty_like(statistic)


@register_fake("layer_norm_bwd")
def _layer_norm_bwd_fake(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    center: Tensor,
    rstd: Tensor,
    y_dtype: torch.dtype | None,
    cast_dtype: torch.dtype | None,
    with_dx_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like_x(dtype: torch.dtype | None) -> Tensor:
        return x.new_empty(0) if dtype is None else x.new_empty(x.shape, dtype=dtype)

    dweight, dbias = (x.new_empty(x.shape[-1], dtype=torch.float32) for _ in range(2))
    dx_sum = x.new_empty(x.shape[-1] if with_dx_sum else 0, dtype=torch.float32)
    return like_x(x.dtype), dweight, dbias, like_x(y_dtype), like_x(cast_dtype), dx_sum
