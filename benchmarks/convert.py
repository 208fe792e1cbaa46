"""Time and memory of converting a ViT-B/16 checkpoint (112 M parameters, fp32) between layouts.

    python benchmarks/convert.py [--repeats 5] [--out FILE]

prints a table and writes results/<machine>/convert.json. Each conversion runs in a fresh process,
its source in the page cache. The peak is what that process holds above its imports. Needs
safetensors.
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
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": memory.high_water() - baseline}))


def measure(folder: Path, source: str, target: str, to: str, repeats: int) -> dict[str, Any]:
    runs, out, read = [], folder / target, folder / source
    for _ in range(repeats):
        if out.is_dir():
            shutil.rmtree(out)
        out.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--one", str(read), str(out), to]
        runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    size = sum(file.stat().st_size for file in (read.iterdir() if read.is_dir() else [read]))
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
