"""bias_gelu on a GPU: exact GELU, v * cdf(v) of v = x + bias. Backward sums the columns of dx over
chunks of rows in the same pass; a second kernel adds the chunks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuned import tile_for
from ._common import as_rows, column_block, launch, sum_columns

INV_SQRT_2PI = tl.constexpr(0.39894228040)
LOG2_INV_SQRT_2PI = tl.constexpr(-1.3257480647)
HALF_LOG2_E = tl.constexpr(0.72134752044)
MAX = tl.constexpr(3.402823466e38)


@triton.jit
def _tail(v):
    """z = |v|, density(z) and cdf(-z): for fp32 results, the gradient of an fp32 bias among them.

    cdf(-z) over exp(-z^2 / 2) is a polynomial in 1 / (1 + p z), the form of Abramowitz and Stegun
    7.1.26, here around z = 0, where it is exact; a minimax fit, 2e-8 absolute and 4e-6 relative.
    1 + erf would lose the digits of the tail.
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
    return z, bell * INV_SQRT_2PI, bell * (0.5 - s * p)


@triton.jit
def _narrow_tail(v):
    """z = |v|, density(z) and cdf(-z) for 16-bit results, with half the arithmetic of _tail.

    log2(cdf(-z)) is a polynomial with the value -1 at 0, a minimax fit. The relative error of
    cdf(-z) is 1.4e-5 for z < 5.5, 1.1e-4 for z < 7, and 7 % at 10, where it is 1e-23; the leading
    coefficient takes it to 0 beyond.
    """
    z = tl.abs(v)
    z = tl.where(z > MAX, MAX, z)
    q = -1.53131788e-06 * z + 5.49985779e-05
    q = q * z - 0.000874293998
    q = q * z + 0.008270978
    q = q * z - 0.0534495839
    q = q * z - 0.458983527
    q = q * z - 1.15106152
    q = q * z - 1.0
    return z, tl.exp2(v * v * -HALF_LOG2_E + LOG2_INV_SQRT_2PI), tl.exp2(q)


@triton.jit
def _tail_for(v, WIDE: tl.constexpr):
    return _tail(v) if WIDE else _narrow_tail(v)


@triton.jit
def _gelu(v, z, cdf):
    """v cdf(v) = max(v, 0) - z cdf(-z)"""
    return tl.maximum(v, 0.0) - z * cdf


@triton.jit
def _gelu_slope(v, z, density, cdf):
    """cdf(v) + v density(v); for z it is one less what it is for -z."""
    left = cdf - z * density
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
    z, _, cdf = _tail_for(v, x_ptr.dtype.element_ty == tl.float32)
    tl.store(y_ptr + (row * D)[:, None] + d[None, :], _gelu(v, z, cdf).to(y_ptr.dtype.element_ty), mask=inside)


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
    chunk,
    dy_stride,
    x_stride,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * chunk
    for step in tl.range(0, chunk, ROWS, num_stages=STAGES):
        row = first + step + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        v = _biased(x_ptr, bias_ptr, (row * x_stride)[:, None] + d[None, :], d, inside, D)
        dout = tl.load(dy_ptr + (row * dy_stride)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        z, density, cdf = _tail_for(v, WIDE)
        out = dout * _gelu_slope(v, z, density, cdf)
        at = (row * D)[:, None] + d[None, :]
        tl.store(dx_ptr + at, out.to(dx_ptr.dtype.element_ty), mask=inside)
        if y_ptr is not None:
            z, _, cdf = _tail_for(v, x_ptr.dtype.element_ty == tl.float32)  # the bits of the forward pass
            tl.store(y_ptr + at, _gelu(v, z, cdf).to(y_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            total += out
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + d, tl.sum(total, axis=0), mask=d < D)


def forward_tile(D: int, device: torch.device) -> dict[str, int]:
    cols = column_block(D)
    return tile_for("bias_gelu_fwd", D, device, {"ROWS": min(16, 2048 // cols), "COLS": cols, "num_warps": 4})


def backward_tile(D: int, device: torch.device) -> dict[str, int]:
    cols = min(128, triton.next_power_of_2(D))
    return tile_for("bias_gelu_bwd", D, device, {"ROWS": 8, "COLS": cols, "STAGES": 3, "num_warps": 4})


def bias_gelu_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    y, D = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    if x.numel():
        x, bias, tile = as_rows(x), None if bias is None else bias.contiguous(), forward_tile(D, x.device)
        rows, x_stride = x.shape[0], x.stride(0)
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(D, tile["COLS"]))
        launch(_bias_gelu_fwd_kernel, grid, x_ptr=x, bias_ptr=bias, y_ptr=y, rows=rows, D=D, x_stride=x_stride, **tile)
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
    x, dy, tile = as_rows(x), as_rows(dy), backward_tile(D, x.device)
    columns = triton.cdiv(D, tile["COLS"])
    # about 8,192 programs of 16 to 256 rows; the shape alone fixes the order of the sum
    chunk = min(256, max(16, triton.next_power_of_2(x.shape[0] * columns // 8192 + 1) // 2))
    chunks = triton.cdiv(x.shape[0], chunk)
    partial = torch.empty(chunks, D, dtype=torch.float32, device=x.device) if summed else None
    launch(
        _bias_gelu_bwd_kernel,
        (chunks, columns),
        dy_ptr=dy,
        x_ptr=x,
        bias_ptr=None if bias is None else bias.contiguous(),
        dx_ptr=dx,
        y_ptr=y if with_y else None,
        partial_ptr=partial,
        rows=x.shape[0],
        D=D,
        chunk=chunk,
        dy_stride=dy.stride(0),
        x_stride=x.stride(0),
        WIDE=torch.float32 in (x.dtype, None if bias is None else bias.dtype),
        **tile,
    )
    if partial is not None:
        sum_columns(partial, dbias)
    return dx, dbias, y
