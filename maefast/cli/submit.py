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
    parser.add_argument(
        "--ngpus", type=whole(0), default=8, help="GPUs, and processes, per machine (%(default)s); 0: one process on CPUs"
    )
    parser.add_argument("--nodes", type=whole(1), default=2, help="number of machines (%(default)s)")
    parser.add_argument("--timeout", type=whole(1), default=4320, metavar="MINUTES", help="time limit of the job (%(default)s)")
    parser.add_argument("--job_dir", type=Path, required=True, metavar="DIR", help="folder of the job's logs, and the output_dir")
    parser.add_argument("--partition", help="partition of the cluster")
    parser.add_argument("--comment", help="comment for the scheduler")
    parser.add_argument(
        "--cluster", type=one_of(CLUSTERS), default="slurm", help="slurm; local: processes here; debug: in this process"
    )
    add_options(parser)


def run(given: dict[str, Any]) -> None:
    from ..train.pretrain.submit import Job, submit

    job = pop(Job, given)
    submit(from_arguments({"output_dir": job.job_dir, "resume": "auto"} | given), job)
