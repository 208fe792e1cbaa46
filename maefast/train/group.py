"""The processes of a run, connected: what they tell each other."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ToldByAnother, UserError
from .launch import find_launch

if TYPE_CHECKING:
    from .pretrain.options import Options

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees them. What they tell each other goes over the CPU and waits for no GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = None  # None: started alone

    @property
    def main(self) -> bool:
        """Whether this is the process that writes, logs and draws."""
        return self.rank == 0

    def error(self, message: str) -> UserError:
        """An error that all processes raise; the first one tells it."""
        return UserError(message) if self.main else ToldByAnother(message)

    def most(self, *values: float) -> list[float]:
        """The greatest over the processes, of each value."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """Over the processes; on a GPU without waiting for it."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def all(self, value: T) -> list[T]:
        """That of each process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, value: T) -> T:
        """That of the first process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def agree(self, error: UserError | None) -> None:
        """Raise in all processes what any of them has to say."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        messages = self.all(None if error is None else str(error))
        if any(message is not None for message in messages):
            rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
            where = "" if len(set(messages)) == 1 else f"process {rank} of {self.size}: "
            raise self.error(f"{where}{message}") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that raises UserError in all processes where it does in one; it must not talk to the others."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        self.agree(error)


@contextmanager
def joined(options: "Options") -> Iterator[Group]:
    """The processes that were started for this run, connected for the length of the block, or as they already are.

    Raises UserError where they cannot find each other, and where one is lost.
    """
    launch = find_launch(options)
    if launch is None and not (dist.is_available() and dist.is_initialized()):
        yield Group()
        return
    if not dist.is_available():
        raise UserError("several processes need a torch with torch.distributed; this one has none")
    started_here = not dist.is_initialized()
    if started_here and launch is not None:
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        try:
            # Gloo beside NCCL: what the processes agree on in each step must not wait for the GPU.
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
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost another one, which may say why: {reason}"
        ) from error
    if started_here:
        # What DDP keeps of the group goes first: the last to let go of it joins its threads, and those may want the interpreter.
        gc.collect()
        dist.barrier()  # the first process holds the store that the others still ask
        dist.destroy_process_group()


def _lost(error: RuntimeError) -> bool:
    """Whether a collective failed because a process has gone, or none of its answers came in time."""
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or "gloo" in str(error)
