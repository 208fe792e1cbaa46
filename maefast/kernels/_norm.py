"""What layer_norm and add_layer_norm share: rows normalised in registers, several at a time."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuned import tile_for
from ._common import as_rows, launch


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_triples(a, b, c, d, e, f):
    """Combine three sums over rows, which one tl.reduce exchanges together between warps."""
    return a + d, b + e, c + f


@triton.jit
def normalise(value, inside, D, eps):
    """Return value [ROWS, BLOCK], zero where not `inside`, normalised, its mean and
    1 / sqrt(var + eps).

    The mean is rounded to fp32; the residue, the mean of value - mean, keeps rows exact whose mean
    is far larger than their spread.
    """
    mean = tl.sum(value, axis=1) / D
    difference = tl.where(inside, value - mean[:, None], 0.0)
    residue, square = tl.reduce((difference, difference * difference), 1, _add_pairs)
    residue = residue / D
    variance = tl.maximum(square / D - residue * residue, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return (difference - residue[:, None]) * rstd[:, None], mean, rstd


@triton.jit
def scaled(normalised, weight_ptr, bias_ptr, d, D):
    gain = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    shift = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    return normalised * gain[None, :] + shift[None, :]


def launch_forward(
    kernel: Any, name: str, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, eps: float, **more: Any
) -> tuple[Tensor, Tensor]:
    """Launch a kernel that normalises rows into y, with `more` that it takes. Return mean, rstd."""
    D, x_rows = x.shape[-1], as_rows(x)
    rows = x_rows.shape[0]
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        tile = forward_tile(name, D, x)
        launch(
            kernel,
            (triton.cdiv(rows, tile["ROWS"]),),
            x_ptr=x_rows,
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            y_ptr=y,
            mean_ptr=mean,
            rstd_ptr=rstd,
            rows=rows,
            D=D,
            eps=eps,
            x_stride=x_rows.stride(0),
            **more,
            **tile,
        )
    return mean, rstd


def forward_tile(kernel: str, D: int, x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(D)  # a whole row
    values = 4096 if x.dtype == torch.float32 else 8192  # fp32 branches spill beyond
    rows, warps = (min(16, 1024 // block), 4) if block <= 512 else (max(1, min(4, values // block)), 8)
    return tile_for(kernel, D, x.device, {"BLOCK": block, "ROWS": rows, "num_warps": warps})
