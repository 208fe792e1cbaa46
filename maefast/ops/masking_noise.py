"""Masking noise: the random numbers that decide which patches are kept."""

import torch
from torch import Tensor

from .._library import fragment

# One opaque op: Inductor replaces a torch.rand that it can see by another generator, and eager and compiled masks would differ.
fragment.define("masking_noise(SymInt N, SymInt L, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


@torch.library.impl(fragment, "masking_noise", "CompositeExplicitAutograd")
def _masking_noise(N: int, L: int, device: torch.device) -> Tensor:
    return torch.rand(N, L, dtype=torch.float32, device=device)


@torch.library.register_fake("maefast::masking_noise")
def _masking_noise_fake(N: int, L: int, device: torch.device) -> Tensor:
    return torch.empty(N, L, dtype=torch.float32, device=device)


def masking_noise(N: int, L: int, device: torch.device | str) -> Tensor:
    """Uniform noise in [0, 1), the draw of `torch.rand(N, L, device=device)` from torch's default generator.

    returns  (N, L) fp32; the patches of a row that have the smallest values are kept (He et al. 2022, section 3, "Masking")
    Raises ValueError when N or L is negative.
    """
    if N < 0 or L < 0:
        raise ValueError(f"N and L must not be negative; they are {N} and {L}")
    return torch.ops.maefast.masking_noise(N, L, torch.device(device))
