"""Rank and rendezvous of a process, from the variables of mpirun, torchrun or srun."""

import os
import re
from dataclasses import dataclass

from .errors import ToldByAnother, UserError


@dataclass(frozen=True)
class Launch:
    """A launcher's settings: `rank` among all processes, `local_rank` within a machine."""

    rank: int
    world_size: int
    local_rank: int
    url: str


def find_launch(
    *, world_size: int | None = None, local_rank: int | None = None, dist_on_itp: bool = False, dist_url: str = "env://"
) -> Launch | None:
    """Read the variables of mpirun (with `dist_on_itp`), torchrun or srun; None without a launcher.

    world_size    the expected number of processes; None: any
    local_rank    the rank on this machine, for launchers that set no LOCAL_RANK
    dist_url      where the processes meet; "env://" under srun: the first machine of the job step
    Raises UserError for missing or broken variables and for another number of processes.
    """
    if dist_on_itp:
        rank, world, local = (_variable(f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "SIZE", "LOCAL_RANK"))
        launch = Launch(rank, world, local, f"tcp://{_text('MASTER_ADDR')}:{_variable('MASTER_PORT')}")
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local = _variable("LOCAL_RANK") if "LOCAL_RANK" in os.environ else local_rank or 0
        launch = Launch(_variable("RANK"), _variable("WORLD_SIZE"), local, dist_url)
    elif "SLURM_STEP_NUM_TASKS" in os.environ and _variable("SLURM_STEP_NUM_TASKS") > 1:  # set by srun, not in a batch script
        url = _slurm_url() if dist_url == "env://" else dist_url
        launch = Launch(_variable("SLURM_PROCID"), _variable("SLURM_STEP_NUM_TASKS"), _variable("SLURM_LOCALID"), url)
    else:
        launch = None
    started, rank = (1, 0) if launch is None else (launch.world_size, launch.rank)
    if world_size not in (None, started):
        hint = f"start them with torchrun --nproc_per_node {world_size} -m maefast pretrain"
        message = f"--world_size must be the number of processes that were started, {started}; it is {world_size} ({hint})"
        raise UserError(message) if rank == 0 else ToldByAnother(message)
    return launch


def _text(name: str) -> str:
    if not os.environ.get(name):
        raise UserError(f"{name} must be set by the launcher of several processes; it is empty or not set")
    return os.environ[name]


def _variable(name: str) -> int:
    if not (text := _text(name)).isascii() or not text.isdigit():
        raise UserError(f"{name} must be a whole number, set by the launcher of several processes; it is {text!r}")
    return int(text)


def _slurm_url() -> str:
    """Return the address of the first machine of the job step, at a port of the job's own."""
    address = os.environ.get("MASTER_ADDR") or first_host(_text("SLURM_STEP_NODELIST"))
    port = _variable("MASTER_PORT") if "MASTER_PORT" in os.environ else 10000 + _variable("SLURM_JOB_ID") % 20000
    return f"tcp://{address}:{port}"


def first_host(nodes: str) -> str:
    """Return the first name of a list as SLURM abbreviates it: "gpu[07-09,12],cpu1" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else nodes)
