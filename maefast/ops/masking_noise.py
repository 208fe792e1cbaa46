"""Masking noise: the random numbers that decide which patches are kept."""

import torch
from torch import Tensor

from .._library import fragment

# An opaque op: Inductor replaces torch.rand by another generator, and compiled masks would differ.
fragment.define("masking_noise(SymInt N, SymInt L, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


@torch.library.impl(fragment, "masking_noise", "CompositeExplicitAutograd")
def _masking_noise(N: int, L: int, device: torch.device) -> Tensor:
    return torch.rand(N, L, dtype=torch.float32, device=device)


@torch.library.register_fake("maefast::masking_noise")
def _masking_noise_fake(N: int, L: int, device: torch.device) -> Tensor:
    return torch.empty(N, L, dtype=torch.float32, device=device)


def masking_noise(N: int, L: int, device: torch.device | str) -> Tensor:
    """Return the draw of torch.rand(N, L, device=device), fp32; random_masking keeps the smallest.

    Raises ValueError when N or L is negative.
    """
    if N < 0 or L < 0:
        raise ValueError(f"N and L must not be negative; they are {N} and {L}")
    return torch.ops.maefast.masking_noise(N, L, torch.device(device))
