"""bias_gelu on a GPU: exact GELU, v * cdf(v) of v = x + bias. Backward sums the bias's gradient over chunks of rows in the same
pass; a second kernel adds the chunks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuned import tile_for
from ._common import as_rows, column_block, launching_on, rows_per_chunk, sum_columns

INV_SQRT_2PI = tl.constexpr(0.39894228040)
HALF_LOG2_E = tl.constexpr(0.72134752044)
MAX = tl.constexpr(3.402823466e38)


@triton.jit
def _tail(v):
    """z = |v|, exp(-z^2 / 2), and cdf(-z) over that.

    The ratio is a polynomial in 1 / (1 + p z), the form of Abramowitz and Stegun 7.1.26, here around z = 0, so that it is exact
    there; a least-maximum fit, 2e-8 absolute and 4e-6 relative. 1 + erf would lose the digits of the tail.
    """
    z = tl.abs(v)
    z = tl.where(z > MAX, MAX, z)  # infinity times a bell of zero would be NaN
    bell = tl.exp2(v * v * -HALF_LOG2_E)
    s = 1.0 - 1.0 / (0.33 * z + 1.0)
    p = 0.0465495417 * s - 0.099630055
    p = p * s - 0.0353165202
    p = p * s + 0.147851501
    p = p * s + 0.318541586
    p = p * s - 1.08679965
    p = p * s + 1.20891638
    return z, bell, 0.5 - s * p


@triton.jit
def _gelu(v, z, bell, ratio):
    """v cdf(v) = max(v, 0) - z cdf(-z)"""
    return tl.maximum(v, 0.0) - z * (bell * ratio)


@triton.jit
def _gelu_slope(v, z, bell, ratio):
    """cdf(v) + v density(v); for z it is one less what it is for -z."""
    left = bell * (ratio - INV_SQRT_2PI * z)
    return tl.where(v < 0.0, left, 1.0 - left)


@triton.jit
def _biased(x_ptr, bias_ptr, at, d, inside, D):
    v = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return v


@triton.jit
def _bias_gelu_fwd_kernel(x_ptr, bias_ptr, y_ptr, rows, D, x_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    v = _biased(x_ptr, bias_ptr, (row * x_stride)[:, None] + d[None, :], d, inside, D)
    z, bell, ratio = _tail(v)
    tl.store(y_ptr + (row * D)[:, None] + d[None, :], _gelu(v, z, bell, ratio).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_bwd_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    y_ptr,
    partial_ptr,
    rows,
    D,
    dy_stride,
    x_stride,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for step in range(0, CHUNK, ROWS):
        row = tl.program_id(0).to(tl.int64) * CHUNK + step + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        v = _biased(x_ptr, bias_ptr, (row * x_stride)[:, None] + d[None, :], d, inside, D)
        dout = tl.load(dy_ptr + (row * dy_stride)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        z, bell, ratio = _tail(v)
        out = dout * _gelu_slope(v, z, bell, ratio)
        at = (row * D)[:, None] + d[None, :]
        tl.store(dx_ptr + at, out.to(dx_ptr.dtype.element_ty), mask=inside)
        if y_ptr is not None:
            tl.store(y_ptr + at, _gelu(v, z, bell, ratio).to(y_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            total += out
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + d, tl.sum(total, axis=0), mask=d < D)


def config(kernel: str, D: int, device: torch.device) -> dict[str, int]:
    cols = column_block(D)
    return tile_for(kernel, D, device, {"ROWS": min(16, 2048 // cols), "COLS": cols, "num_warps": 4})


def bias_gelu_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    y, D = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    if x.numel():
        rows, tile = as_rows(x), config("bias_gelu_fwd", D, x.device)
        grid = (triton.cdiv(rows.shape[0], tile["ROWS"]), triton.cdiv(D, tile["COLS"]))
        with launching_on(x):
            _bias_gelu_fwd_kernel[grid](
                x_ptr=rows,
                bias_ptr=None if bias is None else bias.contiguous(),
                y_ptr=y,
                rows=rows.shape[0],
                D=D,
                x_stride=rows.stride(0),
                **tile,
            )
    return y


def bias_gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, with_y: bool, with_dx_sum: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    D, summed = x.shape[-1], with_dx_sum or bias is not None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape if with_y else 0, dtype=x.dtype, device=x.device)
    dbias = torch.zeros(D if summed else 0, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return dx, dbias, y
    x, dy, tile = as_rows(x), as_rows(dy), config("bias_gelu_bwd", D, x.device)
    chunk = rows_per_chunk(x.shape[0])
    chunks = triton.cdiv(x.shape[0], chunk)
    partial = torch.empty(chunks, D, dtype=torch.float32, device=x.device) if summed else None
    with launching_on(x):
        _bias_gelu_bwd_kernel[(chunks, triton.cdiv(D, tile["COLS"]))](
            dy_ptr=dy,
            x_ptr=x,
            bias_ptr=None if bias is None else bias.contiguous(),
            dx_ptr=dx,
            y_ptr=y if with_y else None,
            partial_ptr=partial,
            rows=x.shape[0],
            D=D,
            dy_stride=dy.stride(0),
            x_stride=x.stride(0),
            CHUNK=chunk,
            **tile,
        )
        if partial is not None:
            sum_columns(partial, dbias)
    return dx, dbias, y
