"""`maefast submit`: `maefast pretrain` as a SLURM job, through submitit."""

import signal
from functools import partial
from typing import Any

from ..errors import UserError
from . import options


class Pretraining:
    """What each task of the job runs, and what submitit pickles again when it asks for the job to be started once more."""

    def __init__(self, options: "options.Options"):
        self.options = options

    def __call__(self) -> dict[str, Any]:
        import submitit

        from .build import training_images
        from .trainer import pretrain

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
