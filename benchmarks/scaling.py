"""Time of a ViT-B/16 training step by batch size and threads: eager reference and maefast.

    PYTHONPATH=tests python benchmarks/scaling.py [--batches 1 2] [--dtypes fp32 bf16] [--out FILE]

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


def measure(label: str, size: Size, dtype: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    bench = StepWorkload(label, size, dtype, torch.device("cpu")).bench()
    runs = {name: bench.run(name) for name in CONTENDERS}
    samples = rotate(runs, WallTimer(), Budget(seconds=15, least=3, most=41), bench.sets, warmup=1)
    median = {name: statistics.median(values) for name, values in samples.items()}
    speed = ", ".join(f"{name} {value * 1e3:.1f} ms ({median['reference-sdpa'] / value:.2f} x)" for name, value in median.items())
    print(f"{label}, {dtype}, batch {size.batch}, {threads} threads: {speed}", flush=True)
    return {"model": label, "dtype": dtype, "batch": size.batch, "threads": threads, "seconds": median}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/<machine>/scaling.json")
    args = parser.parse_args()
    most, info, rows = torch.get_num_threads(), machine.describe(torch.device("cpu")), []
    for dtype in args.dtypes:
        rows += [measure(label, size, dtype, most) for label, size in DEMO.items()]
        for batch, threads in (*((batch, most) for batch in args.batches), (4, 1)):
            rows.append(measure("vit_b16", replace(CPU["vit_b16"], batch=batch), dtype, threads))
    print(report.write_rows("scaling", info, rows, args.out))


if __name__ == "__main__":
    main()
