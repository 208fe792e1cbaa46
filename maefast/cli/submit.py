"""`maefast submit`."""

import argparse
from pathlib import Path
from typing import Any

from ..train.pretrain.options import from_arguments
from ..train.values import one_of, whole
from .flags import add_options, pop

HELP = "pre-train as a SLURM job"
CLUSTERS = ("slurm", "local", "debug")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ngpus", type=whole(0), default=8, help="GPUs, and processes, per machine (%(default)s); 0: one process on CPUs")
    add("--nodes", type=whole(1), default=2, help="number of machines (%(default)s)")
    add("--timeout", type=whole(1), default=4320, metavar="MINUTES", help="time limit of the job (%(default)s)")
    add("--job_dir", type=Path, required=True, metavar="DIR", help="folder of the job's logs, and the output_dir")
    add("--partition", help="partition of the cluster")
    add("--comment", help="comment for the scheduler")
    add("--cluster", type=one_of(CLUSTERS), default="slurm", help="slurm; local: processes here; debug: in this process")
    add_options(parser)


def run(given: dict[str, Any]) -> None:
    from ..train.pretrain.submit import Job, submit

    job = pop(Job, given)
    submit(from_arguments({"output_dir": job.job_dir, "resume": "auto"} | given), job)
