"""add_layer_norm on a GPU: a program adds a few rows to the residual and normalises the sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows
from ._norm import launch_forward, normalise, scaled


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
    rows,
    D,
    eps,
    x_stride,
    residual_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = (row * D)[:, None] + d[None, :]
    value = tl.load(x_ptr + (row * x_stride)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    value += tl.load(residual_ptr + (row * residual_stride)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    stored = value.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, stored, mask=inside)
    normalised, mean, rstd = normalise(stored.to(tl.float32), inside, D, eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    tl.store(y_ptr + at, scaled(normalised, weight_ptr, bias_ptr, d, D).to(y_ptr.dtype.element_ty), mask=inside)


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual_rows, y = as_rows(residual), torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    more = {"residual_ptr": residual_rows, "residual_stride": residual_rows.stride(0), "total_ptr": total}
    mean, rstd = launch_forward(_add_layer_norm_fwd_kernel, "add_layer_norm_fwd", x, weight, bias, y, eps, **more)
    return y, total, mean, rstd
