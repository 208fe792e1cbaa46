"""Facts about a GPU for dispatch and launchers; torch.compile treats both functions as constants.

Where torch finds no GPU the tensors are fake ones, and the answers are those of an A100.
"""

import os
from typing import Any

import torch

_CAPABILITY_OF_A100 = (8, 0)
_SHARED_MEMORY_OF_A100 = 163 << 10
_in_use_at_fork = _forked = False


def _before_fork() -> None:
    global _in_use_at_fork
    _in_use_at_fork = torch.cuda.is_initialized()


def _after_fork_in_child() -> None:
    global _forked
    _forked = _in_use_at_fork


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability, (major, minor). Raises RuntimeError in a process forked after
    CUDA was initialised."""
    if _forked:
        raise RuntimeError(
            f"a process that is forked after CUDA was initialised cannot use {device}: start it by the method spawn or "
            "forkserver of multiprocessing, or before the first use of a GPU"
        )
    if not torch.cuda.is_available():
        return _CAPABILITY_OF_A100
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one block of threads may use."""
    if not torch.cuda.is_available():
        return _SHARED_MEMORY_OF_A100
    properties: Any = torch.cuda.get_device_properties(device)  # its stub knows less than it does
    return int(properties.shared_memory_per_block_optin)
