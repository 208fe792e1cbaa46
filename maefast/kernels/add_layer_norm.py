"""add_layer_norm on a GPU: a program adds one row of the branch to the residual and normalises the sum as stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, launching_on
from ._norm import config, store_normalised


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    D,
    eps,
    x_stride,
    residual_stride,
    BLOCK: tl.constexpr,
):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x_ptr + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    value += tl.load(residual_ptr + row * residual_stride + d, mask=d < D, other=0.0).to(tl.float32)
    stored = value.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * D + d, stored, mask=d < D)
    store_normalised(
        stored.to(tl.float32),
        d,
        row,
        weight_ptr=weight_ptr,
        bias_ptr=bias_ptr,
        y_ptr=y_ptr,
        mean_ptr=mean_ptr,
        rstd_ptr=rstd_ptr,
        D=D,
        eps=eps,
    )


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D, x_rows, residual_rows = x.shape[-1], as_rows(x), as_rows(residual)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    mean = torch.empty(x_rows.shape[0], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        with launching_on(x):
            _add_layer_norm_fwd_kernel[(x_rows.shape[0],)](
                x_ptr=x_rows,
                residual_ptr=residual_rows,
                weight_ptr=weight.contiguous(),
                bias_ptr=bias.contiguous(),
                y_ptr=y,
                total_ptr=total,
                mean_ptr=mean,
                rstd_ptr=rstd,
                D=D,
                eps=eps,
                x_stride=x_rows.stride(0),
                residual_stride=residual_rows.stride(0),
                **config("add_layer_norm_fwd", D, x.device),
            )
    return y, total, mean, rstd
