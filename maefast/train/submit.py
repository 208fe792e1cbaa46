"""`maefast submit`: `maefast pretrain` as a SLURM job, through submitit."""

import argparse
import signal
from functools import partial
from pathlib import Path
from typing import Any

from . import UserError, options
from .flags import one_of, whole

CLUSTERS = ("slurm", "local", "debug")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ngpus", type=whole(0), default=8, help="GPUs of a machine, and processes on it (%(default)s); 0: a CPU"
    )
    parser.add_argument("--nodes", type=whole(1), default=2, help="machines (%(default)s)")
    parser.add_argument("--timeout", type=whole(1), default=4320, metavar="MINUTES", help="of the job (%(default)s)")
    parser.add_argument("--job_dir", type=Path, required=True, metavar="DIR", help="for logs of the job, and the output_dir")
    parser.add_argument("--partition", help="of the cluster")
    parser.add_argument("--comment", help="for the scheduler")
    parser.add_argument(
        "--cluster", type=one_of(CLUSTERS), default="slurm", help="slurm; local: processes here; debug: in this process"
    )
    options.add_arguments(parser)


class Pretraining:
    """What each task of the job runs, and what submitit pickles again when it asks for the job to be started once more."""

    def __init__(self, options: "options.Options"):
        self.options = options

    def __call__(self) -> dict[str, Any]:
        import submitit

        from .pretrain import pretrain
        from .setup import training_images

        environment = submitit.JobEnvironment()
        if environment.num_tasks > 1:
            # Each process finds its GPU by its rank on the machine.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's, for the end of the job's time and for pre-emption
        summary = pretrain(self.options, partial(training_images, self.options))
        if summary["signal"] == signal.SIGUSR2 and callable(requeue):
            requeue(signal.SIGUSR2, None)
        return summary

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(given: dict[str, Any]) -> str:
    """Start the job that the arguments of the command ask for; returns its number.

    Raises UserError where submitit or the cluster is missing, and for options that are wrong, before anything is written.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError('submit needs submitit: pip install "maefast[slurm]"') from error
    job = {name: given.pop(name) for name in ("ngpus", "nodes", "timeout", "job_dir", "partition", "comment", "cluster")}
    folder, config = job["job_dir"], given.pop("config")
    chosen = options.from_arguments({"output_dir": folder, "resume": "auto"} | given, config)
    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=job["cluster"], slurm_max_num_timeout=1000)
    except RuntimeError as error:
        raise UserError(f"--cluster {job['cluster']} cannot be used here: {error}") from error
    executor.update_parameters(
        name="maefast",
        nodes=job["nodes"],
        tasks_per_node=max(1, job["ngpus"]),
        gpus_per_node=job["ngpus"],
        timeout_min=job["timeout"],
        slurm_signal_delay_s=120,
        **{f"slurm_{name}": job[name] for name in ("partition", "comment") if job[name] is not None},
    )
    submitted = executor.submit(Pretraining(chosen))
    print(f"job {submitted.job_id}, logs in {submitted.paths.folder}", flush=True)
    if job["cluster"] != "slurm":
        submitted.result()
    return str(submitted.job_id)
