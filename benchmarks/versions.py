"""Time this checkout against another one, in one rotation.

`python benchmarks/versions.py OTHER [--full] [--out FILE]` writes results/<machine>/versions.json.
OTHER is a checkout with its library built in place. Each has its own process, and they take turns.
The one that waits is stopped, since its idle OpenMP threads would spin on the cores of the other. A
turn is an untimed run and 30 ms of timed ones. The groups that both have are compared, by the
contender that a user gets.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODULES = ("test_ops", "test_blocks", "test_step")
MINE = ("maefast", "maefast-auto", "maefast-native")  # names of the contender, the preferred one first
SETS, WARM_UP = 3, 2
TURN = 0.03  # seconds
# Freed memory is kept: whether glibc maps a tensor anew would depend on what ran before it.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 28)}


class Checkout:
    """A process that runs the benchmarks of the checkout at `root`."""

    def __init__(self, root: Path, full: bool):
        path = os.pathsep.join(map(str, (root, root / "benchmarks", root / "tests")))
        command = [sys.executable, __file__, "--serve", *(["--full"] if full else [])]
        environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"} | MALLOC
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process: Any = subprocess.Popen(command, env=environment, cwd=root, text=True, **pipes)

    def ask(self, *words: object) -> str:
        self.process.send_signal(signal.SIGCONT)
        print(*words, file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"the benchmarks of {self.process.args} ended with {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)
        return answer.strip()


def serve(full: bool) -> None:
    """Answer the questions on stdin: list the groups, make one ready, time one run."""
    import importlib

    import torch

    answers, sys.stdout = sys.stdout, sys.stderr
    found = {w.name: w for module in MODULES for w in importlib.import_module(module).workloads(full, torch.device("cpu"))}
    run = None
    for line in sys.stdin:
        match line.split():
            case ["groups"]:
                answer: object = " ".join(found)
            case ["take", name]:
                run = None  # frees its tensors
                run = found[name].bench().run(next(c for c in MINE if c in found[name].contenders))
                answer = "ready"
            case ["run", i]:
                started = time.perf_counter()
                run(int(i))
                repeats = max(1, int(TURN / (time.perf_counter() - started)))
                started = time.perf_counter()
                for _ in range(repeats):
                    run(int(i))
                answer = (time.perf_counter() - started) / repeats
        print(answer, file=answers, flush=True)


def compare(name: str, checkouts: dict[str, Checkout], rounds: int) -> dict[str, object]:
    """Return the medians of both, and the quartiles of the ratio within a round."""
    samples: dict[str, list[float]] = {which: [] for which in checkouts}
    for which in checkouts.values():
        which.ask("take", name)
    for r in range(-WARM_UP, rounds):
        for which in list(checkouts)[:: 1 if r % 2 else -1]:
            seconds = float(checkouts[which].ask("run", r % SETS))
            if r >= 0:
                samples[which].append(seconds)
    ratios = [other / this for this, other in zip(samples["this"], samples["other"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {f"{which}_seconds": statistics.median(values) for which, values in samples.items()}
    return {"group": name, **medians, "other_over_this": middle, "quartiles": [low, high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("other", type=Path, nargs="?", help="a checkout with its library built in place")
    parser.add_argument("--full", action="store_true", help="ViT-B/16 sizes, every dtype")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, help="instead of results/<machine>/versions.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.full)
        return
    import machine
    import report
    import torch

    roots = {"this": Path(__file__).parents[1], "other": args.other.resolve()}
    checkouts = {which: Checkout(root, args.full) for which, root in roots.items()}
    mine, theirs = (checkout.ask("groups").split() for checkout in checkouts.values())
    rows = []
    for name in [name for name in mine if name in theirs]:
        rows.append(compare(name, checkouts, args.rounds))
        print("{group:32} {this_seconds:.3g} s, the other {other_over_this:.3f} x as long".format(**rows[-1]), flush=True)
    for checkout in checkouts.values():
        checkout.process.kill()
    other = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=args.other, text=True).strip()
    info = machine.describe(torch.device("cpu")) | {"other": other, "size": "full" if args.full else "quick"}
    print(report.write_rows("versions", info, rows, args.out))


if __name__ == "__main__":
    main()
