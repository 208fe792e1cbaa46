"""What the kernels share: how tiles are cut, the device that a launch goes to, and the normalisation of a uint8 pixel."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: within the block that is the one of `tensor`."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` itself where its last dimension is dense, else a contiguous copy."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def column_block(width: int) -> int:
    """The power of two, up to 512, that cuts `width` with the least waste; the largest of those that waste the same."""
    if width <= 128:
        return triton.next_power_of_2(width)
    return min((512, 256, 128), key=lambda block: triton.cdiv(width, block) * block)


@triton.jit
def normalised(pixel, mean, rstd):
    """(pixel / 255 - mean) * rstd for uint8 values; the quotient correctly rounded, as a division would give it."""
    pixel = pixel.to(tl.float32)
    quotient = pixel * (1 / 255)
    quotient = tl.fma(tl.fma(quotient, -255.0, pixel), 1 / 255, quotient)
    return (quotient - mean) * rstd
