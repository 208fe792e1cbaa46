"""layer_norm on a GPU: a program normalises a few rows. Backward, which also serves add_layer_norm:
a program sums the gradients of weight and bias and the columns of dx over a chunk of rows; a second
kernel adds the chunks."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuned import tile_for
from ._common import as_rows, launch, sum_columns
from ._norm import add_triples, launch_forward, normalise, scaled


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, D, eps, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    value = tl.load(x_ptr + (row * x_stride)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    normalised, mean, rstd = normalise(value, inside, D, eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = scaled(normalised, weight_ptr, bias_ptr, d, D)
    tl.store(y_ptr + (row * D)[:, None] + d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


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
    chunk,
    dy_stride,
    dresidual_stride,
    x_stride,
    WITH_DX_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    gain = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dweight, dbias, dx_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * chunk
    for step in tl.range(0, chunk, ROWS, num_stages=STAGES):
        row = first + step + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        at = (row * D)[:, None] + d[None, :]
        value = tl.load(x_ptr + (row * x_stride)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dy_ptr + (row * dy_stride)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        scale = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        difference = tl.where(inside, value - mean, 0.0)
        g = dout * gain
        residue, mean_g, mean_gx = tl.reduce((difference, g, g * difference), 1, add_triples)
        residue, mean_g = residue[:, None] / D, mean_g[:, None] / D
        mean_gx = (mean_gx[:, None] / D - residue * mean_g) * scale  # of g times the normalised x
        xhat = (difference - residue) * scale
        dweight += tl.sum(dout * xhat, axis=0)  # a thread holds all rows of a column: no exchange
        dbias += tl.sum(dout, axis=0)
        out = (g - mean_g - xhat * mean_gx) * scale
        if dresidual_ptr is not None:
            residual = dresidual_ptr + (row * dresidual_stride)[:, None] + d[None, :]
            out += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
        if WITH_DX_SUM:
            dx_sum += tl.sum(tl.where(inside, out, 0.0), axis=0)
        tl.store(dx_ptr + at, out.to(dx_ptr.dtype.element_ty), mask=inside)
        if dx_cast_ptr is not None:
            tl.store(dx_cast_ptr + at, out.to(dx_cast_ptr.dtype.element_ty), mask=inside)
        if y_ptr is not None:
            shift = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            tl.store(y_ptr + at, (xhat * gain + shift).to(y_ptr.dtype.element_ty), mask=inside)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (3 if WITH_DX_SUM else 2) * D + d
    tl.store(partial, dweight, mask=d < D)
    tl.store(partial + D, dbias, mask=d < D)
    if WITH_DX_SUM:
        tl.store(partial + 2 * D, dx_sum, mask=d < D)


class _BackwardTile(NamedTuple):
    width: int  # the widest row
    rows: int
    num_warps: int
    programs: int  # 132 times what an SM of an H200 holds best, so that the shape alone fixes sums


_BACKWARD_TILES = (
    _BackwardTile(width=128, rows=1, num_warps=1, programs=528),
    _BackwardTile(width=256, rows=1, num_warps=2, programs=528),
    _BackwardTile(width=512, rows=1, num_warps=4, programs=528),
    _BackwardTile(width=768, rows=2, num_warps=4, programs=2112),
    _BackwardTile(width=1024, rows=2, num_warps=4, programs=1056),
    _BackwardTile(width=2048, rows=2, num_warps=4, programs=528),
    _BackwardTile(width=8192, rows=1, num_warps=16, programs=528),
)
_LEAST_ROWS = 4  # of a program, or the second kernel has too much to add
_PIPELINE_BYTES = 88 << 10  # of shared memory, which a GPU with 99 KB for a program has beside what the sums take


def backward_tile(D: int, row_bytes: int, device: torch.device) -> dict[str, int]:
    """Return the tile; a program reads `row_bytes` of one row."""
    tile = next(tile for tile in _BACKWARD_TILES if tile.width >= D)
    block = triton.next_power_of_2(D)
    # Triton keeps STAGES - 1 steps in flight.
    stages = 1 + min(2, _PIPELINE_BYTES * D // (tile.rows * block * row_bytes))
    rule = {"BLOCK": block, "ROWS": tile.rows, "STAGES": stages, "num_warps": tile.num_warps, "PROGRAMS": tile.programs}
    return tile_for("layer_norm_bwd", D, device, rule)


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = launch_forward(_layer_norm_fwd_kernel, "layer_norm_fwd", x, weight, bias, y, eps)
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
    rows, read = x.shape[0], [t for t in (x, dy, dresidual) if t is not None]
    tile = backward_tile(D, D * sum(t.element_size() for t in read), x.device)
    least = max(_LEAST_ROWS, triton.cdiv(rows, tile.pop("PROGRAMS")))
    chunk = triton.cdiv(least, tile["ROWS"]) * tile["ROWS"]
    chunks = triton.cdiv(rows, chunk)
    partial = torch.empty(chunks, (3 if with_dx_sum else 2) * D, dtype=torch.float32, device=x.device)
    launch(
        _layer_norm_bwd_kernel,
        (chunks,),
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
        rows=rows,
        D=D,
        chunk=chunk,
        dy_stride=dy.stride(0),
        dresidual_stride=0 if dresidual is None else dresidual.stride(0),
        x_stride=x.stride(0),
        WITH_DX_SUM=with_dx_sum,
        **tile,
    )
    sum_columns(partial, dweight, dbias, *([dx_sum] if with_dx_sum else []))
    return out["dx"], dweight, dbias, out["y"], out["dx_cast"], dx_sum
