"""Layer norm: each row normalised by its mean and variance, in the dtype that the next op reads."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch, kernels
from .._library import register_fake
from ..dispatch import Kernel, Op
from ._checks import check_out_dtype, check_rows

MAX_WIDTH = 8192  # of a row that Triton's kernels hold in registers


class NormAsk(NamedTuple):
    """What the choice of a norm's kernel depends on."""

    device: torch.device
    x: torch.dtype
    weight: torch.dtype
    bias: torch.dtype
    out: torch.dtype
    width: int


def _why_not_triton(ask: NormAsk) -> str | None:
    if ask.width > MAX_WIDTH:
        return f"triton layer_norm takes rows of up to {MAX_WIDTH} values, x has {ask.width}"
    return None


def _why_not_apex(ask: NormAsk) -> str | None:
    dtypes = {ask.x, ask.weight, ask.bias}
    return None if len(dtypes) == 1 else f"apex layer_norm takes tensors of one dtype, they are {dispatch.names_of((*dtypes,))}"


KERNELS = (
    Kernel("native", ("cpu",)),
    Kernel("triton", kernels.DEVICES, why_not=_why_not_triton),
    Kernel("apex", ("cuda",), capability=(0, 0), why_not=_why_not_apex),
)
AUTO = {"cpu": ("native",), "cuda": ("triton",)}
OP = Op("layer_norm", KERNELS, AUTO, lambda device, dtype: NormAsk(device, dtype, dtype, dtype, dtype, width=768))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    The variance is biased; statistics are in fp32 or wider.
    x             (..., D)  floating-point
    weight, bias  (D,)      floating-point, of any dtype
    dtype                   of the result; by default that of x
    returns       (..., D)
    Gradients for x, weight and bias, deterministic.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit.
    """
    check_rows(x, weight=weight, bias=bias)
    dtype = check_out_dtype(dtype, x.dtype)
    backend = dispatch.choose(OP, NormAsk(x.device, x.dtype, weight.dtype, bias.dtype, dtype, x.shape[-1]))
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
        dweight, dbias = dweight.to(weight.dtype) if needs_weight else None, dbias.to(bias.dtype) if needs_bias else None
        return None, dx if needs_x else None, dweight, dbias, None, None


@register_fake("layer_norm_fwd")
def _layer_norm_fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
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
