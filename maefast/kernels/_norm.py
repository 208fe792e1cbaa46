"""What layer_norm and add_layer_norm share: rows normalised in registers, several at a time."""

import torch
import triton
import triton.language as tl

from ..tuned import tile_for


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_triples(a, b, c, d, e, f):
    """Combines three sums over rows, which one tl.reduce then exchanges together between warps."""
    return a + d, b + e, c + f


@triton.jit
def normalise(value, inside, D, eps):
    """value [ROWS, BLOCK] of rows of D, zero where not `inside` -> the rows normalised, their mean and 1 / sqrt(var + eps).

    The mean is rounded to fp32; the residue, what is left of the mean of value - mean, keeps rows exact whose mean is far larger
    than their spread.
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


def forward_tile(kernel: str, D: int, x: torch.Tensor) -> dict[str, int]:
    """BLOCK, a whole row, and ROWS of them: 1,024 values of narrow rows; four wider ones, up to 8,192 values, of fp32 4,096."""
    block = triton.next_power_of_2(D)
    if block <= 512:
        rule = {"BLOCK": block, "ROWS": min(16, 1024 // block), "num_warps": 4}
    else:
        values = 4096 if x.dtype == torch.float32 else 8192  # fp32 branches spill beyond
        rule = {"BLOCK": block, "ROWS": max(1, min(4, values // block)), "num_warps": 8}
    return tile_for(kernel, D, x.device, rule)
