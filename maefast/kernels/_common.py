"""What the kernels share: launches, tiles, sums of columns, uint8 pixels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

# Kernel, device, dtypes and numbers of a launch -> what Triton compiled for it.
_compiled: dict[tuple[Any, ...], CompiledKernel] = {}
_MOST_COMPILED = 4096  # entries of 1 KB


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor.

    Triton binds, specialises and looks up every argument of a launch, which takes 8 us of host
    time. This takes 5 (docs/notes/step.md). For tensors that do not start at a multiple of 16 bytes
    Triton compiles another kernel; they are launched by Triton itself.
    """
    addresses, device, kinds = 0, next(iter(arguments.values())).device, []
    for value in arguments.values():
        if isinstance(value, Tensor):
            addresses |= value.data_ptr()
            kinds.append(value.dtype)
        else:
            kinds.append(value)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, **arguments)
    elif addresses % 16 or not isinstance(kernel, JITFunction):  # the interpreter compiles nothing
        kernel[grid](**arguments)
    elif compiled := _compiled.get(key := (kernel, device.index, *kinds)):
        compiled[(*grid, 1, 1)[:3]](*[arguments[name] for name in kernel.arg_names])
    else:
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = kernel[grid](**arguments)


def dense_rows(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a contiguous copy if its last dimension is not dense."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def dense_statistics(mean: Tensor | None, std: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return both statistics of uint8 images dense, or none."""
    return (None, None) if mean is None or std is None else (mean.contiguous(), std.contiguous())


def strides_of(imgs: Tensor) -> dict[str, int]:
    """Return the strides of images (N, C, H, W) by the names of the kernels' arguments."""
    return dict(zip(("stride_n", "stride_c", "stride_h", "stride_w"), imgs.stride(), strict=True))


def as_rows(tensor: Tensor) -> Tensor:
    """Return `tensor` (..., D) as (rows, D) with dense rows; a copy if no view has them."""
    return dense_rows(tensor.reshape(-1, tensor.shape[-1]))


def column_block(width: int) -> int:
    """Return the largest power of two, up to 512, that cuts `width` with least waste."""
    if width <= 128:
        return triton.next_power_of_2(width)
    return min((512, 256, 128), key=lambda block: triton.cdiv(width, block) * block)


def rows_per_chunk(rows: int, least: int = 16) -> int:
    """Return `least` .. 128 rows for about 2000 chunks; the shape alone fixes the order of sums."""
    return min(128, max(least, triton.next_power_of_2(triton.cdiv(rows, 2048))))


@triton.jit
def _column_sum_kernel(
    partial_ptr, first_ptr, second_ptr, third_ptr, chunks, D, partial_stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    d, which = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.program_id(1)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        at = chunk.to(tl.int64)[:, None] * partial_stride + (which * D + d)[None, :]
        sums += tl.load(partial_ptr + at, mask=(chunk < chunks)[:, None] & (d < D)[None, :], other=0.0)
    column = tl.sum(sums, axis=0)
    tl.store(first_ptr + d, column, mask=(d < D) & (which == 0))
    if second_ptr is not None:
        tl.store(second_ptr + d, column, mask=(d < D) & (which == 1))
    if third_ptr is not None:
        tl.store(third_ptr + d, column, mask=(d < D) & (which == 2))


def sum_columns(partial: Tensor, *totals: Tensor) -> None:
    """Add the chunks of partial (chunks, k D), fp32, into k <= 3 totals of D values; only the
    number of chunks determines the order of the additions."""
    D = totals[0].numel()
    first, second, third = (*totals, None, None)[:3]
    launch(
        _column_sum_kernel,
        (triton.cdiv(D, 16), len(totals)),
        partial_ptr=partial,
        first_ptr=first,
        second_ptr=second,
        third_ptr=third,
        chunks=partial.shape[0],
        D=D,
        partial_stride=partial.shape[1],
        ROWS=512,
        COLS=16,
        num_warps=8,
    )


@triton.jit
def normalised(pixel, mean, rstd):
    """(pixel / 255 - mean) * rstd for uint8 values; the quotient is correctly rounded."""
    pixel = pixel.to(tl.float32)
    quotient = pixel * (1 / 255)
    quotient = tl.fma(tl.fma(quotient, -255.0, pixel), 1 / 255, quotient)
    return (quotient - mean) * rstd
