"""Time of a ViT-B/16 training step by category, for the eager reference and for maefast.

    PYTHONPATH=tests python benchmarks/step_profile.py [--dtype fp32|bf16] [--host]

prints a Markdown table from torch.profiler's own time of each op. With --host it prints the ops and
the Python functions that a step of 8 images calls, the CPU time of all ops, and the time of the
step, on one core. That model has the blocks of ViT-B/16, made so narrow that kernels take next to
no time.
"""

import argparse
import statistics
import sys
from collections import defaultdict

import torch
from stepbench import SETS, Size, StepWorkload
from test_step import CPU, DECODER
from torch.profiler import ProfilerActivity, profile

from maefast.testing.timing import Budget, Run, WallTimer, rotate

CATEGORIES = {
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn", "mkl_linear", "maefast::linear"),
    "attention": ("attention", "_softmax", "aten::bmm", "aten::baddbmm"),
    "layer norm": ("layer_norm",),
    "GELU": ("gelu",),
    "masking, unshuffle, loss": ("random_masking", "gather", "unshuffle", "masked_mse", "sort", "scatter", "index"),
    "optimizer": ("adamw", "Optimizer"),
    "copies and casts": ("copy_", "cat", "clone", "fill_", "zero_"),
    "sums and additions": ("sum", "aten::add", "aten::mul"),
}
CONTENDERS = ("reference-sdpa", "maefast-no-pred")
# the depths and heads of ViT-B/16; 4 patches, heads 4 and 2 wide
NARROW = Size(8, 32, 16, 48, 12, 12, **(DECODER | {"decoder_embed_dim": 32}))


def category(op: str) -> str:
    return next((name for name, parts in CATEGORIES.items() if any(part in op for part in parts)), "the rest")


def warmed_up(workload: StepWorkload, contender: str) -> Run:
    run = workload.bench().run(contender)
    for _ in range(4):  # until malloc keeps what a step needs
        run(0)
    return run


def milliseconds(workload: StepWorkload, contender: str) -> dict[str, float]:
    run = warmed_up(workload, contender)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run(1)
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        spent[category(event.key)] += event.self_cpu_time_total / 1e3
    return spent


def host_work(run: Run) -> tuple[int, int, float]:
    """Return how many ops and Python functions a step calls, and the CPU ms of its ops."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        run(1)
    finally:
        sys.setprofile(None)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run(1)
    ops = [event for event in profiled.key_averages() if "::" in event.key]
    return sum(event.count for event in ops), calls, sum(event.self_cpu_time_total for event in ops) / 1e3


def print_host_work(dtype: str) -> None:
    torch.set_num_threads(1)
    workload = StepWorkload("narrow", NARROW, dtype, torch.device("cpu"))
    runs = {contender: warmed_up(workload, contender) for contender in CONTENDERS}
    samples = rotate(runs, WallTimer(), Budget(seconds=0, least=100, most=100), SETS)
    print("| | ops | Python calls | CPU ms of ops | ms |\n| --- | ---: | ---: | ---: | ---: |")
    for contender, times in samples.items():
        ops, calls, spent = host_work(runs[contender])
        print(f"| {contender} | {ops} | {calls} | {spent:.1f} | {1e3 * statistics.median(times):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--host", action="store_true", help="what Python does for a step, instead")
    options = parser.parse_args()
    if options.host:
        print_host_work(options.dtype)
        return
    workload = StepWorkload("vit_b16", CPU["vit_b16"], options.dtype, torch.device("cpu"))
    spent = {contender: milliseconds(workload, contender) for contender in CONTENDERS}
    for times in spent.values():
        times["all"] = sum(times.values())
    print("| ms | " + " | ".join(CONTENDERS) + " |\n| --- | ---: | ---: |")
    for name in (*CATEGORIES, "the rest", "all"):
        print(f"| {name} | " + " | ".join(f"{spent[contender][name]:.0f}" for contender in CONTENDERS) + " |")


if __name__ == "__main__":
    main()
