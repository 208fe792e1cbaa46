"""Kill `maefast pretrain` at random: `python tests/fuzz/kills.py --count 200 --seed 0`.

The same command is started anew after each kill until the run has finished, half of the time with
two workers. Lost is a run whose newest checkpoint is older after a kill, or that cannot be resumed.
Different is a finished run whose losses or weights have not the bits of a run without kills.
"""

import argparse
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pretraining import flags, pictures, records

from maefast import cli
from maefast.train import checkpoints

LENGTH = {"epochs": 12, "accum_iter": 2, "save_steps": 3, "resume": "auto"}  # 48 steps on 64 images
NOTHING = (-1, 0)  # the progress of a run without a checkpoint


def command(folder: Path, workers: int) -> None:
    os.setpgrp()
    with folder.with_suffix(".txt").open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.exit(cli.main(flags(folder.parent / "images.npy", folder, num_workers=workers, **LENGTH)))


def start(folder: Path, workers: int) -> Any:
    process = get_context("fork").Process(target=command, args=(folder, workers))
    process.start()
    with suppress(ProcessLookupError):  # it may have ended
        os.setpgid(process.pid, process.pid)
    return process


def progress(folder: Path) -> tuple[int, int]:
    """Epoch and step of the newest checkpoint."""
    found = checkpoints.find(folder)
    if not found:
        return NOTHING
    entries = checkpoints.read(found[-1])
    return entries["epoch"], entries["run"]["step"]


def outcome(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    return [record["train_loss"] for record in records(folder)], checkpoints.read(checkpoints.find(folder)[-1])["model"]


def kill(home: Path, workers: int, count: int, draw: random.Random) -> Counter[str]:
    """`count` kills of runs in `home`, and what became of the runs."""
    began, whole = time.perf_counter(), home / f"whole-{workers}"
    process = start(whole, workers)
    process.join()
    assert process.exitcode == 0, whole.with_suffix(".txt").read_text()
    seconds, (losses, weights) = time.perf_counter() - began, outcome(whole)
    seen, number, finished = Counter[str](), 0, True
    while seen["kills"] < count or not finished:
        folder = home / f"run-{workers}-{number}"
        before, parts = progress(folder), {*folder.glob(".checkpoint*")}
        began, process = time.perf_counter(), start(folder, workers)
        process.join(draw.uniform(0, seconds) if seen["kills"] < count else None)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        if not (finished := process.exitcode != -signal.SIGKILL):
            seen["kills"] += 1
            seen["before a checkpoint"] += not checkpoints.find(folder)
            seen["while saving"] += bool({*folder.glob(".checkpoint*")} - parts)
            seen["lost"] += progress(folder) < before
            continue
        number += 1
        if before == NOTHING:  # as long as a whole run takes here and now
            seconds = time.perf_counter() - began
        if process.exitcode:
            seen["lost"] += 1
            print(folder.with_suffix(".txt").read_text(), file=sys.stderr)
            continue
        seen["finished runs"] += 1
        got, tensors = outcome(folder)
        seen["different"] += got != losses or not all(torch.equal(tensors[name], weights[name]) for name in weights)
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    given = parser.parse_args()
    columns = ("kills", "before a checkpoint", "while saving", "finished runs", "lost", "different")
    print(f"| workers | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    bad = 0
    with tempfile.TemporaryDirectory() as home:
        np.save(Path(home, "images.npy"), pictures(64))
        torch.set_num_threads(1)
        with redirect_stdout(io.StringIO()):  # what a run imports, the runs that are forked have then
            cli.main(flags(Path(home, "images.npy"), Path(home, "first"), epochs=1))
        for workers in (0, 2):
            seen = kill(Path(home), workers, given.count // 2, random.Random(f"{given.seed} {workers}"))
            print(f"| {workers} | {' | '.join(str(seen[column]) for column in columns)} |", flush=True)
            bad += seen["lost"] + seen["different"]
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
