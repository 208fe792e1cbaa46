"""layer_norm on a GPU: a program normalises one row. Backward, which also serves add_layer_norm: a program takes a chunk of rows,
one after the other, and sums the gradients of weight and bias over them; a second kernel adds the chunks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, launching_on, rows_per_chunk, sum_columns
from ._norm import config, store_normalised


@triton.jit
def _layer_norm_fwd_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, D, eps, x_stride, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x_ptr + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    store_normalised(
        value, d, row, weight_ptr=weight_ptr, bias_ptr=bias_ptr, y_ptr=y_ptr, mean_ptr=mean_ptr, rstd_ptr=rstd_ptr, D=D, eps=eps
    )


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dresidual_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    y_ptr,
    dx_cast_ptr,
    partial_ptr,
    rows,
    D,
    dy_stride,
    dresidual_stride,
    x_stride,
    WITH_DX_SUM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    inside = d < D
    gain = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    dweight, dbias, dx_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * CHUNK
    for i in range(0, tl.minimum(CHUNK, rows - first)):
        row = first.to(tl.int64) + i
        value = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dy_ptr + row * dy_stride + d, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd_ptr + row)
        difference = tl.where(inside, value - tl.load(mean_ptr + row), 0.0)
        g = dout * gain
        residue, mean_g = tl.sum(difference) / D, tl.sum(g) / D
        mean_gx = (tl.sum(g * difference) / D - residue * mean_g) * scale  # of g times the normalised x
        xhat = (difference - residue) * scale
        dweight += dout * xhat
        dbias += dout
        out = (g - mean_g - xhat * mean_gx) * scale
        if dresidual_ptr is not None:
            out += tl.load(dresidual_ptr + row * dresidual_stride + d, mask=inside, other=0.0).to(tl.float32)
        if WITH_DX_SUM:
            dx_sum += out
        tl.store(dx_ptr + row * D + d, out.to(dx_ptr.dtype.element_ty), mask=inside)
        if dx_cast_ptr is not None:
            tl.store(dx_cast_ptr + row * D + d, out.to(dx_cast_ptr.dtype.element_ty), mask=inside)
        if y_ptr is not None:
            again = xhat * gain + tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_ptr + row * D + d, again.to(y_ptr.dtype.element_ty), mask=inside)
    at = partial_ptr + tl.program_id(0).to(tl.int64) * (3 if WITH_DX_SUM else 2) * D + d
    tl.store(at, dweight, mask=inside)
    tl.store(at + D, dbias, mask=inside)
    if WITH_DX_SUM:
        tl.store(at + 2 * D, dx_sum, mask=inside)


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    D, in_rows = x.shape[-1], as_rows(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = torch.empty(in_rows.shape[0], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        tile = config("layer_norm_fwd", D, x.device)
        with launching_on(x):
            _layer_norm_fwd_kernel[(in_rows.shape[0],)](
                x_ptr=in_rows,
                weight_ptr=weight.contiguous(),
                bias_ptr=bias.contiguous(),
                y_ptr=y,
                mean_ptr=mean,
                rstd_ptr=rstd,
                D=D,
                eps=eps,
                x_stride=in_rows.stride(0),
                **tile,
            )
    return y, mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    y_dtype: torch.dtype | None,
    cast_dtype: torch.dtype | None,
    with_dx_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    D, out = x.shape[-1], {}
    for name, dtype in (("dx", x.dtype), ("y", y_dtype), ("dx_cast", cast_dtype)):
        out[name] = torch.empty(0 if dtype is None else x.shape, dtype=dtype or x.dtype, device=x.device)
    dweight, dbias, dx_sum = (torch.zeros(n, dtype=torch.float32, device=x.device) for n in (D, D, D if with_dx_sum else 0))
    if x.numel() == 0:
        return out["dx"], dweight, dbias, out["y"], out["dx_cast"], dx_sum
    x, dy, dresidual = as_rows(x), as_rows(dy), None if dresidual is None else as_rows(dresidual)
    chunk = rows_per_chunk(x.shape[0], least=4)
    chunks, tile = triton.cdiv(x.shape[0], chunk), config("layer_norm_bwd", D, x.device, values=512)
    partial = torch.empty(chunks, (3 if with_dx_sum else 2) * D, dtype=torch.float32, device=x.device)
    with launching_on(x):
        _layer_norm_bwd_kernel[(chunks,)](
            dy_ptr=dy,
            dresidual_ptr=dresidual,
            x_ptr=x,
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            mean_ptr=mean,
            rstd_ptr=rstd,
            dx_ptr=out["dx"],
            y_ptr=None if y_dtype is None else out["y"],
            dx_cast_ptr=None if cast_dtype is None else out["dx_cast"],
            partial_ptr=partial,
            rows=x.shape[0],
            D=D,
            dy_stride=dy.stride(0),
            dresidual_stride=0 if dresidual is None else dresidual.stride(0),
            x_stride=x.stride(0),
            WITH_DX_SUM=with_dx_sum,
            CHUNK=chunk,
            **tile,
        )
        sum_columns(partial, dweight, dbias, *([dx_sum] if with_dx_sum else []))
    return out["dx"], dweight, dbias, out["y"], out["dx_cast"], dx_sum
