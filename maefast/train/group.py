"""The processes of a run, connected, and their collectives."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ToldByAnother, UserError
from .launch import Launch

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees them. Messages do not wait for a GPU."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None  # None: started alone

    @property
    def main(self) -> bool:
        """Return whether this is the process that writes, logs and draws."""
        return self.rank == 0

    def error(self, message: str) -> UserError:
        """Return an error that all processes raise and the first one prints."""
        return UserError(message) if self.main else ToldByAnother(message)

    def all_reduce_max(self, *values: float) -> list[float]:
        """Return the greatest of each value over the processes."""
        if self.world_size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def all_reduce_mean(self, value: Tensor) -> Tensor:
        """Return the mean over the processes; on a GPU without waiting for it."""
        if self.world_size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def all_gather(self, value: T) -> list[T]:
        """Return the value of each process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the value of the first process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def raise_any(self, error: UserError | None) -> None:
        """Raise an error in all processes if one of them has one."""
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        messages = self.all_gather(None if error is None else str(error))
        if found := [(rank, message) for rank, message in enumerate(messages) if message is not None]:
            rank, message = found[0]
            where = "" if len(set(messages)) == 1 else f"process {rank} of {self.world_size}: "
            raise self.error(f"{where}{message}") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block without collectives. Raise a UserError of one process in all of them."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        self.raise_any(error)


@contextmanager
def connected(launch: Launch | None) -> Iterator[Group]:
    """Connect the processes of a launch during the block, unless they are connected already. Raises
    UserError if they cannot reach each other, or if one is lost."""
    if launch is None and not (dist.is_available() and dist.is_initialized()):
        yield Group()
        return
    if not dist.is_available():
        raise UserError("several processes need a torch with torch.distributed; this one has none")
    started_here = not dist.is_initialized()
    if started_here and launch is not None:
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        try:
            # Gloo beside NCCL: the agreements of each step must not wait for the GPU.
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            dist.init_process_group(backend, launch.url, world_size=launch.world_size, rank=launch.rank)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            where = f"process {launch.rank} of {launch.world_size} cannot reach the others by --dist_url {launch.url}"
            raise UserError(f"{where}: {reason}") from error
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), 0 if launch is None else launch.local_rank)
    except RuntimeError as error:
        if not _lost(error):
            raise
        what = f"lost another process, which may say why: {str(error).splitlines()[0]}"
        raise UserError(f"process {dist.get_rank()} of {dist.get_world_size()} {what}") from error
    if started_here:
        gc.collect()  # DDP's references to the group: freeing the last joins threads that may need the interpreter
        dist.barrier()  # the first process holds the store that the others still use
        dist.destroy_process_group()


def _lost(error: RuntimeError) -> bool:
    """Return whether a collective failed because a process is gone or did not answer in time."""
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or "gloo" in str(error)
