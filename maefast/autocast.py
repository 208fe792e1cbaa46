"""The dtype of matrix products under autocast."""

import torch
from torch import Tensor

from ._torch import AUTOCAST_DEVICES


def is_autocast(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether autocast casts products of such tensors; float64 it leaves alone, as torch."""
    return device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type) and dtype != torch.float64


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of matrix products of such tensors: autocast's, or their own."""
    return torch.get_autocast_dtype(device.type) if is_autocast(device, dtype) else dtype


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that matrix products of `x` run in."""
    return product_dtype(x.device, x.dtype)
