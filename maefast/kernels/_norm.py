"""The normalised row that layer_norm and add_layer_norm share. A program holds one row in registers."""

import torch
import triton
import triton.language as tl

from ..tuned import tile_for


@triton.jit
def store_normalised(value, d, row, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, D, eps):
    """The two statistics of a row `value` [BLOCK], zero beyond D, and the row normalised.

    The mean is rounded to fp32; the residue, what is left of the mean of value - mean, keeps rows exact whose mean is far larger
    than their spread.
    """
    average = tl.sum(value) / D
    difference = tl.where(d < D, value - average, 0.0)
    residue = tl.sum(difference) / D
    variance = tl.maximum(tl.sum(difference * difference) / D - residue * residue, 0.0, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(mean_ptr + row, average)
    tl.store(rstd_ptr + row, scale)
    gain = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    shift = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    out = (difference - residue) * scale * gain + shift
    tl.store(y_ptr + row * D + d, out.to(y_ptr.dtype.element_ty), mask=d < D)


def config(kernel: str, D: int, device: torch.device, values: int = 1024) -> dict[str, int]:
    """BLOCK, a row, and a warp for each `values` of it."""
    block = triton.next_power_of_2(D)
    return tile_for(kernel, D, device, {"BLOCK": block, "num_warps": min(16, max(1, block // values))})
