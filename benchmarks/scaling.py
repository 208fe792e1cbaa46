"""Time of a ViT-B/16 training step by batch size and threads, for the eager reference and maefast in
rotation.

    PYTHONPATH=tests python benchmarks/scaling.py [--batches 1 2 4 16 64] [--dtypes fp32 bf16]
    [--out FILE]

prints a table and writes results/<machine>/scaling.json.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import report
import torch
from stepbench import Size, StepWorkload
from test_step import CPU

from maefast.testing.timing import Budget, WallTimer, rotate

CONTENDERS = ("reference-sdpa", "maefast", "maefast-no-pred")
DEMO = {  # the sizes of its two models
    "demo, photographs": Size(16, 64, 4, 64, 3, 2, decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=2),
    "demo, digits": Size(64, 8, 2, 64, 4, 4, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4),
}


def measure(label: str, workload: StepWorkload, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    bench = workload.bench()
    runs = {name: bench.run(name) for name in CONTENDERS}
    samples = rotate(runs, WallTimer(), Budget(seconds=15, least=3, most=41), bench.sets, warmup=1)
    median = {name: statistics.median(values) for name, values in samples.items()}
    row = {"model": label, "dtype": workload.variant, "batch": workload.images, "threads": threads, "seconds": median}
    speed = ", ".join(f"{name} {value * 1e3:.1f} ms ({median['reference-sdpa'] / value:.2f} x)" for name, value in median.items())
    print(f"{label}, {workload.variant}, batch {workload.images}, {threads} threads: {speed}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/<machine>/scaling.json")
    args = parser.parse_args()
    device, most = torch.device("cpu"), torch.get_num_threads()
    info = machine.describe(device)
    rows = []
    for dtype in args.dtypes:
        for label, size in DEMO.items():
            rows.append(measure(label, StepWorkload(label, size, dtype, device), most))
        for batch in args.batches:
            rows.append(measure("vit_b16", StepWorkload("vit_b16", replace(CPU["vit_b16"], batch=batch), dtype, device), most))
        rows.append(measure("vit_b16", StepWorkload("vit_b16", replace(CPU["vit_b16"], batch=4), dtype, device), 1))
    print(report.write_rows("scaling", info, rows, args.out))


if __name__ == "__main__":
    main()
