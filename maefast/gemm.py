"""Products of a Linear on Hopper that the kernels of csrc/cuda/gemm compute in place of cuBLAS.

A product gives y (rows, features) from x (rows, depth). Its kind says what else happens in the same
kernel:

    linear               x W^T + bias, weight (features, depth)
    linear_gelu_fwd      the same and its exact GELU
    input_gradient       x W, weight (depth, features), where x is the gradient of a Linear's output
    linear_gelu_bwd      the same times the slope of GELU at the pre-activation
    linear_gelu_bwd_sum  the same and its sums over the rows, the gradient of the bias before GELU
"""

import torch
from torch import Tensor

from . import _library, _torch, gpu, tuned

HAS_KERNELS = _library.HAS_CUDA and _torch.has_kernel("maefast::linear_gelu_fwd", "CUDA")
KINDS = ("linear", "linear_gelu_fwd", "input_gradient", "linear_gelu_bwd", "linear_gelu_bwd_sum")
FORWARD = KINDS[:2]  # whose weight is (features, depth)
_DEVICE = "cuda"
_CAPABILITY = (9, 0)
_DTYPES = (torch.bfloat16, torch.float16)
_MULTIPLE = 8  # values in the 16 bytes that TMA counts by


def why_not(kind: str, x: Tensor, weight: Tensor, dtype: torch.dtype) -> str | None:
    """Return why no kernel can multiply x (..., depth) and weight in `dtype`, or None."""
    if not HAS_KERNELS:
        return "maefast was built without CUTLASS"
    if x.device.type != _DEVICE:
        return f"the products from CUTLASS run on a GPU, x is on {x.device}"
    if (capability := gpu.capability(x.device)) != _CAPABILITY:
        return f"the products from CUTLASS need compute capability 9.0, x is on a GPU of {tuned.name_of(capability)}"
    if dtype not in _DTYPES:
        return f"the products from CUTLASS are in bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    rows, depth, features = _sizes(kind, x, weight)
    if rows == 0:
        return "x has no rows"
    for name, size in (("summed values", depth), ("features", features)):
        if size == 0 or size % _MULTIPLE != 0:
            return f"the products from CUTLASS take {name} in positive multiples of {_MULTIPLE}, there are {size}"
    for name, t in (("x", x), ("weight", weight)):
        if not _is_readable(t):
            rows_at = "rows that start at multiples of 16 bytes"
            return f"the products from CUTLASS read {rows_at}, the strides of {name} are {t.stride()}"
    return None


def is_faster(kind: str, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a kernel can compute this product, faster than cuBLAS by the table.

    An exported graph keeps to cuBLAS: it runs on other GPUs and with other numbers of rows.
    """
    if not HAS_KERNELS or x.device.type != _DEVICE or _torch.is_exporting():
        return False
    sizes = _sizes(kind, x, weight)
    return tuned.has_faster_product(gpu.capability(x.device), kind, *sizes) and why_not(kind, x, weight, dtype) is None


def _sizes(kind: str, x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Return rows, depth and features."""
    depth = x.shape[-1]
    return x.numel() // max(depth, 1), depth, weight.shape[0 if kind in FORWARD else 1]


def _is_readable(t: Tensor) -> bool:
    """Return whether TMA can step through the rows of t (..., D); others are copied."""
    return t.is_contiguous() or (t.dim() == 2 and t.stride(1) == 1 and t.stride(0) % _MULTIPLE == 0 and t.stride(0) >= t.shape[1])
