"""What dispatch and the launchers of kernels ask of a GPU; constants in compiled code.

Where torch finds no GPU the tensors are fake ones, and the answers are those of an A100.
"""

from typing import Any

import torch

_CAPABILITY_OF_A100 = (8, 0)
_SHARED_MEMORY_OF_A100 = 163 << 10


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability, (major, minor)."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else _CAPABILITY_OF_A100


@torch.compiler.assume_constant_result
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block of threads may ask for."""
    if not torch.cuda.is_available():
        return _SHARED_MEMORY_OF_A100
    properties: Any = torch.cuda.get_device_properties(device)  # its stub knows less than it does
    return int(properties.shared_memory_per_block_optin)
