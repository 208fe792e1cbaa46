"""Time of a ViT-B/16 training step by category, for the eager reference and for maefast.

    PYTHONPATH=tests python benchmarks/step_profile.py [--dtype fp32|bf16]

prints a Markdown table from torch.profiler's own time of each op.
"""

import argparse
from collections import defaultdict

import torch
from stepbench import StepWorkload
from test_step import CPU
from torch.profiler import ProfilerActivity, profile

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
WARMUP = 4  # steps until malloc keeps what a step needs


def category(op: str) -> str:
    return next((name for name, parts in CATEGORIES.items() if any(part in op for part in parts)), "the rest")


def milliseconds(workload: StepWorkload, contender: str) -> dict[str, float]:
    run = workload.bench().run(contender)
    for _ in range(WARMUP):
        run(0)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run(1)
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        spent[category(event.key)] += event.self_cpu_time_total / 1e3
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    workload = StepWorkload("vit_b16", CPU["vit_b16"], parser.parse_args().dtype, torch.device("cpu"))
    spent = {contender: milliseconds(workload, contender) for contender in CONTENDERS}
    print("| ms | " + " | ".join(CONTENDERS) + " |\n| --- | ---: | ---: |")
    for name in (*CATEGORIES, "the rest"):
        print(f"| {name} | " + " | ".join(f"{spent[contender][name]:.0f}" for contender in CONTENDERS) + " |")
    print("| all | " + " | ".join(f"{sum(spent[contender].values()):.0f}" for contender in CONTENDERS) + " |")


if __name__ == "__main__":
    main()
