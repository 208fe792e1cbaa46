"""The device that a command runs on."""

import torch

from .errors import UserError


def find_device(name: str | None, local_rank: int | None = None) -> torch.device:
    """Return the device of that name, by default the GPU if there is one.

    local_rank  of this process among several of this machine, each of which takes a GPU of its own
    Raises UserError if the device is not on this machine.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu, cuda or cuda:N; it is {name!r}")
    if device.type == "cuda" and local_rank is not None:
        if device.index is not None:
            raise UserError(f"--device must be cuda or cpu where processes take a GPU each; it is {name!r}")
        device = torch.device("cuda", find_gpu(local_rank))
        torch.cuda.set_device(device)
    elif device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device must be a GPU of this machine, which has {torch.cuda.device_count()}; it is {name!r}")
    return device


def find_gpu(local_rank: int) -> int:
    """Return the GPU of a process. If only one is visible, the launcher has assigned it."""
    count = torch.cuda.device_count()
    if count != 1 and local_rank >= count:
        raise UserError(f"there must be a GPU for each process of a machine, which has {count}; this is process {local_rank}")
    return 0 if count == 1 else local_rank
