"""`maefast submit`: `maefast pretrain` as a SLURM job, through submitit."""

import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError, user_errors
from .options import Options


class Pretraining:
    """The function of each task of the job. submitit pickles it again to requeue the job."""

    def __init__(self, options: Options):
        self.options = options

    def __call__(self) -> dict[str, Any]:
        import submitit

        from .build import training_images
        from .trainer import pretrain

        environment = submitit.JobEnvironment()
        if environment.num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)  # each finds its GPU by rank
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler of time-outs and pre-emption
        summary = pretrain(self.options, partial(training_images, self.options))
        if summary["signal"] == signal.SIGUSR2 and callable(requeue):
            requeue(signal.SIGUSR2, None)
        return summary

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True)
class Job:
    """The resources of a job."""

    job_dir: Path  # folder of the job's logs
    ngpus: int = 8  # GPUs, and processes, per machine; 0: one process on CPUs
    nodes: int = 2
    timeout: int = 4320  # minutes
    partition: str | None = None
    comment: str | None = None
    cluster: str = "slurm"


def submit(options: Options, job: Job) -> str:
    """Submit a job that pre-trains with `options`; return its number. Raises UserError, before
    anything is written, if submitit or the cluster is missing."""
    try:
        import submitit
    except ImportError as error:
        raise UserError('submit needs submitit: pip install "maefast[slurm]"') from error
    with user_errors(RuntimeError, prefix=f"--cluster {job.cluster} cannot be used here: "):
        executor = submitit.AutoExecutor(folder=job.job_dir / "jobs", cluster=job.cluster, slurm_max_num_timeout=1000)
    executor.update_parameters(
        name="maefast",
        nodes=job.nodes,
        tasks_per_node=max(1, job.ngpus),
        gpus_per_node=job.ngpus,
        timeout_min=job.timeout,
        slurm_signal_delay_s=120,
        **{f"slurm_{name}": value for name in ("partition", "comment") if (value := getattr(job, name)) is not None},
    )
    submitted = executor.submit(Pretraining(options))
    print(f"job {submitted.job_id}, logs in {submitted.paths.folder}", flush=True)
    if job.cluster != "slurm":
        submitted.result()
    return str(submitted.job_id)
