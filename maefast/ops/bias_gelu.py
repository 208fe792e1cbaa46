"""Bias + GELU: the MLP's activation and the bias before it, with both gradients in one pass."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch, kernels
from .._library import register_fake
from ..dispatch import Kernel, Op
from ._checks import check_rows


class GeluAsk(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    x: torch.dtype
    bias: torch.dtype | None


KERNELS = (Kernel("native", ("cpu",)), Kernel("triton", kernels.DEVICES))
AUTO = {"cpu": ("native",), "cuda": ("triton",)}
OP = Op("bias_gelu", KERNELS, AUTO, lambda device, dtype: GeluAsk(device, dtype, dtype))


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The exact (erf) GELU of x + bias; the sum is in fp32 or wider, not rounded before the GELU.

    x        (..., D)  floating-point
    bias     (D,)      floating-point, of any dtype, or None
    returns  (..., D)  in the dtype of x
    Gradients for x and bias, deterministic. Infinities give their limits, which F.gelu does not
    always: 0 at -inf, with slope 0, and inf at inf, with slope 1.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit.
    """
    check_rows(x, bias=bias)
    backend = dispatch.choose(OP, GeluAsk(x.device, x.dtype, None if bias is None else bias.dtype))
    if backend != "eager":
        return _BiasGelu.apply(backend, x, bias)
    return bias_gelu_ref(x, bias)


def bias_gelu_ref(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(wide) if bias is None else x.to(wide) + bias.to(wide)).to(x.dtype)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.backend = backend
        return dispatch.ops_of(backend).bias_gelu_fwd(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias, _ = dispatch.ops_of(ctx.backend).bias_gelu_bwd(dy, x, bias, False)
        _, needs_x, needs_bias = ctx.needs_input_grad
        return None, dx if needs_x else None, dbias.to(bias.dtype) if needs_bias else None


@register_fake("bias_gelu_fwd")
def _bias_gelu_fwd_fake(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("bias_gelu_bwd")
def _bias_gelu_bwd_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, with_y: bool, with_dx_sum: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(x.shape[-1] if with_dx_sum or bias is not None else 0, dtype=torch.float32)
    return x.new_empty(x.shape), dbias, x.new_empty(x.shape if with_y else 0)
