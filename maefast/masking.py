"""Checks of the arguments of MAE.forward that decide what is removed, and a mask as noise."""

import torch
from torch import Tensor

from . import ops


def check_masking(
    imgs: Tensor, L: int, mask_ratio: float, noise: Tensor | None, mask: Tensor | None, weights: Tensor | None
) -> None:
    """Raise TypeError or ValueError unless the arguments fit imgs of L patches; reads no values."""
    if noise is not None and mask is not None:
        raise ValueError("noise and mask both decide what is removed; give one of them")
    N = imgs.shape[0]
    for name, tensor in (("noise", noise), ("mask", mask), ("weights", weights)):
        if tensor is None:
            continue
        if tensor.shape != (N, L):
            raise ValueError(f"{name} must be (N, L) = ({N}, {L}); its shape is {tuple(tensor.shape)}")
        if tensor.device != imgs.device:
            raise ValueError(f"{name} must be on the device of imgs, {imgs.device}; it is on {tensor.device}")
        floating, dtype = tensor.dtype.is_floating_point, tensor.dtype
        wanted, fits = {
            "noise": ("float32", dtype == torch.float32),
            "mask": ("bool or floating-point", floating or dtype == torch.bool),
            "weights": ("floating-point", floating),
        }[name]
        if not fits:
            raise TypeError(f"{name} must be {wanted}; it is {str(dtype).removeprefix('torch.')}")
    if mask is None and not 0 < (len_keep := ops.len_keep(L, mask_ratio)) < L:
        raise ValueError(
            f"mask_ratio must keep at least one of the {L} patches and remove at least one; {mask_ratio} keeps {len_keep}"
        )


def noise_of_mask(mask: Tensor) -> tuple[Tensor, int]:
    """Return a mask of 0 and 1 as noise that ranks its zeros first, and their number."""
    removed = mask.float()
    counts = removed.sum(dim=1)
    # one transfer from the GPU
    facts = torch.stack([counts.min(), counts.max(), ((removed != 0) & (removed != 1)).any().float()]).tolist()
    if facts[2]:
        raise ValueError("mask must hold only 0 (kept) and 1 (removed)")
    if facts[0] != facts[1]:
        raise ValueError(f"mask must remove as many patches in each row; rows remove {int(facts[0])} to {int(facts[1])}")
    L, M = mask.shape[1], int(facts[0])
    if not 0 < M < L:
        raise ValueError(f"mask must keep at least one of the {L} patches and remove at least one; it removes {M}")
    return removed, L - M
