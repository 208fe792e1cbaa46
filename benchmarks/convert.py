"""Time and memory of converting a ViT-B/16 checkpoint with decoder, 112 M parameters in fp32,
between layouts.

    python benchmarks/convert.py [--repeats 5] [--out FILE]

Each conversion runs in a fresh process, its source in the page cache; the peak is that process's
high-water mark less what it held once torch and maefast were imported. Prints a table and writes
results/<machine>/convert.json. Needs safetensors.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import memory
import report
import torch

import maefast
from maefast import checkpoint

CONVERSIONS = (  # source, target, layout; later ones read what earlier ones wrote
    ("official.pth", "transformers", "transformers"),
    ("official.pth", "timm.safetensors", "timm"),
    ("official.pth", "copy.pth", "official"),
    ("transformers", "official-again.pth", "official"),
    ("transformers", "transformers-again", "transformers"),
)


def one(source: str, out: str, to: str) -> None:
    """Convert in a fresh process, and print seconds and bytes above the baseline."""
    memory.forget_high_water()
    baseline, started = memory.resident(), time.perf_counter()
    checkpoint.convert(source, out, to)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_bytes": memory.high_water() - baseline}))


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def measure(folder: Path, source: str, target: str, to: str, repeats: int) -> dict[str, Any]:
    runs = []
    out = folder / target
    for _ in range(repeats):
        if out.is_dir():
            shutil.rmtree(out)
        out.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--one", str(folder / source), str(out), to]
        runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    size = size_of(folder / source)
    seconds, peak = statistics.median(run["seconds"] for run in runs), max(run["peak_bytes"] for run in runs)
    print(f"{source} -> {target}: {seconds:.2f} s, peak {peak / 1e6:.0f} MB, {peak / size:.2f} x the {size / 1e6:.0f} MB read")
    return {"source": source, "to": to, "out": target, "source_bytes": size, "peak_of_source": peak / size, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/<machine>/convert.json")
    parser.add_argument("--one", nargs=3, metavar=("IN", "OUT", "TO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(*args.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": maefast.mae_vit_base_patch16().state_dict()}, Path(folder) / "official.pth")
        rows = [measure(Path(folder), *conversion, args.repeats) for conversion in CONVERSIONS]
    print(report.write_rows("convert", machine.describe(torch.device("cpu")), rows, args.out))


if __name__ == "__main__":
    main()
