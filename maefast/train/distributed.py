"""Several processes of one run: how they find and hear each other, and how the model is spread over them."""

import gc
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import ToldByAnother, UserError

if TYPE_CHECKING:
    from ..model import MAE
    from .options import Options

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """What a launcher told this process; `rank` counts all processes, `local_rank` those of this machine."""

    rank: int
    world_size: int
    local_rank: int
    url: str


def find_launch(options: "Options") -> Launch | None:
    """As mpirun (with --dist_on_itp), torchrun or srun has it, looked for in this order; None: this process was started alone.

    Raises UserError for variables that are missing or no numbers, and where --world_size says otherwise.
    """
    if options.dist_on_itp:
        rank, world, local = (_variable(f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "SIZE", "LOCAL_RANK"))
        launch = Launch(rank, world, local, f"tcp://{_text('MASTER_ADDR')}:{_variable('MASTER_PORT')}")
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local = _variable("LOCAL_RANK") if "LOCAL_RANK" in os.environ else options.local_rank or 0
        launch = Launch(_variable("RANK"), _variable("WORLD_SIZE"), local, options.dist_url)
    elif "SLURM_STEP_NUM_TASKS" in os.environ and _variable("SLURM_STEP_NUM_TASKS") > 1:  # set by srun, not in a batch script
        url = _slurm_url() if options.dist_url == "env://" else options.dist_url
        launch = Launch(_variable("SLURM_PROCID"), _variable("SLURM_STEP_NUM_TASKS"), _variable("SLURM_LOCALID"), url)
    else:
        launch = None
    started, rank = (1, 0) if launch is None else (launch.world_size, launch.rank)
    if options.world_size not in (None, started):
        hint = f"start them with torchrun --nproc_per_node {options.world_size} -m maefast pretrain"
        message = (
            f"--world_size must be the number of processes that were started, {started}; it is {options.world_size} ({hint})"
        )
        raise UserError(message) if rank == 0 else ToldByAnother(message)
    return launch


def _text(name: str) -> str:
    if not os.environ.get(name):
        raise UserError(f"{name} must be set by the launcher of several processes; it is not")
    return os.environ[name]


def _variable(name: str) -> int:
    if not (text := _text(name)).isascii() or not text.isdigit():
        raise UserError(f"{name} must be a whole number, set by the launcher of several processes; it is {text!r}")
    return int(text)


def _slurm_url() -> str:
    """The first machine of the job step, at a port that is the job's own."""
    address = os.environ.get("MASTER_ADDR") or first_host(_text("SLURM_STEP_NODELIST"))
    port = _variable("MASTER_PORT") if "MASTER_PORT" in os.environ else 10000 + _variable("SLURM_JOB_ID") % 20000
    return f"tcp://{address}:{port}"


def first_host(nodes: str) -> str:
    """The first name of a list as SLURM abbreviates it: "gpu[07-09,12],cpu1" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else nodes)


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


def find_gpu(local_rank: int) -> int:
    """The GPU of a process. Where only one is visible, the launcher has dealt them out."""
    count = torch.cuda.device_count()
    if count != 1 and local_rank >= count:
        raise UserError(f"there must be a GPU for each process of a machine, which has {count}; this is process {local_rank}")
    return 0 if count == 1 else local_rank


def shard(model: "MAE", group: Group, device: torch.device) -> None:
    """Spread weights, gradients and optimizer state over the processes (docs/distributed.md); in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (group.size,))
    for module in (*model.blocks, *model.decoder_blocks, model.patch_embed, model):
        fully_shard(module, mesh=mesh)


def replicate(module: nn.Module) -> DistributedDataParallel:
    """The module, its gradients being the mean over the processes after backward."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


@contextmanager
def unsynchronised(module: Any) -> Iterator[None]:
    """Gradients are summed up and not exchanged: for all batches of a step but the last."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield


def finite(state: Any) -> bool:
    """Whether all floating-point numbers in dictionaries and tuples of tensors are finite; of a shard, those that are here."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in _tensors(state))
    checks = [t.isfinite().all() for t in local if t.is_floating_point()]
    devices = {check.device for check in checks}  # one look at each
    return all(bool(torch.stack([check for check in checks if check.device == device]).all()) for device in devices)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with the shards of each tensor put together, on the CPU. All processes must call it."""
    return _mapped(state, lambda value: value.full_tensor().cpu() if hasattr(value, "full_tensor") else value)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    return {name: _mapped(part, change) for name, part in value.items()} if isinstance(value, dict) else change(value)


def spread(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors as shards, where those of that name in `like` are sharded and have their shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def shards(value: Any, target: Any) -> Any:
        if not (isinstance(target, DTensor) and isinstance(value, Tensor) and value.shape == target.shape):
            return value
        # Each process has read the whole: nothing is sent.
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)

    return {name: shards(value, like[name]) if name in like else value for name, value in state.items()}


def spread_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The same for the state_dict of an optimizer: moments are sharded as their parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {i: spread(entry, dict.fromkeys(entry, parameters[i])) for i, entry in state["state"].items()}
    return {**state, "state": moments}
