"""Compiles every kernel for GPUs ahead of time, without one, and writes what each takes into
docs/kernels.csv.

    python scripts/aot_table.py [--jobs 2]

Needs Triton and nvcc (on PATH or in CUDACXX). Exits with 1 where a kernel keeps something in local
memory, loads or stores fewer than 8 bytes at a time where NARROW of tests/aot_cases.py does not
explain it, or rounds fp32 to TF32.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import aot  # noqa: E402
import aot_cases  # noqa: E402
import torch  # noqa: E402
from triton import knobs  # noqa: E402

TABLE = ROOT / "docs" / "kernels.csv"
TRITON_ARCHS = (80, 90, 100)
CUDA_ARCHS = (80, 90, 100, 120)
CUDA_DTYPES = {"float": "fp32", "half": "fp16", "F16": "fp16", "bfloat16": "bf16", "Bf16": "bf16", "unsigned char": "uint8"}
TORCH = Path(torch.__file__).parent


class Cell(NamedTuple):
    registers: int  # of a thread
    stack: int  # bytes of a thread in local memory
    shared: int  # bytes of a program; not what a launch of CUDA C++ asks for
    stores: str  # bytes of an access: instructions

    def __str__(self) -> str:
        return f"{self.registers}/{self.stack}/{self.shared}"


Key = tuple[str, str, str]  # kernel, shape, dtypes
Cells = dict[int, Cell]  # by architecture


def histogram(stores: dict[int, int]) -> str:
    return " ".join(f"{width}:{count}" for width, count in sorted(stores.items(), reverse=True))


def of_triton(task: tuple[str, int]) -> tuple[list[tuple[str, Cell]], list[str]]:
    """Each launch of a case on an architecture, and what is wrong with it."""
    case, arch = task
    with tempfile.TemporaryDirectory() as workdir:
        usages = [aot.compiled(launch, arch, Path(workdir)) for launch in aot_cases.CASES[case]()]
    problems = [problem for u in usages for problem in aot_cases.problems(u.kernel, case, u.stack, u.loads, u.stores)]
    problems += [f"{usage.kernel} of {case} rounds fp32 to TF32" for usage in usages if usage.has_tf32]
    cells = [(u.kernel, Cell(u.registers, u.stack, u.shared, histogram(u.stores))) for u in usages]
    return cells, [f"{problem} on sm_{arch}" for problem in problems]


def of_cuda(nvcc: str, source: Path, arch: int) -> tuple[dict[Key, Cell], list[str]]:
    """As ptxas reports it, with the entries, which decide what templates are made."""
    defines = ["-DMAEFAST_ENTRY", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    command = [nvcc, "-std=c++20", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", *defines, f"-isystem={TORCH / 'include'}"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        done = subprocess.run([*command, "-cubin", source, "-o", cubin.name], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr[-2000:]}")
        accesses = aot.accesses(Path(cubin.name))
    pattern = r"properties for (\w+)\n\s+(\d+) bytes stack.*\n.*Used (\d+) registers(.*)"
    found, problems = {}, []
    for symbol, stack, registers, rest in re.findall(pattern, done.stderr):
        kernel, shape, dtypes = aot.named(symbol)
        (loads, stores), shared = accesses.pop(symbol), re.search(r"(\d+) bytes smem", rest)
        found[kernel, shape, dtypes] = Cell(int(registers), int(stack), int(shared[1]) if shared else 0, histogram(stores))
        problems += aot_cases.problems(kernel, shape, int(stack), loads, stores)
    if accesses:
        raise RuntimeError(f"not all that ptxas said of {source.name} was understood:\n{done.stderr[-2000:]}")
    return found, [f"{problem} on sm_{arch}" for problem in problems]


def rows_of(table: dict[Key, Cells]) -> list[dict[str, str]]:
    """The dtypes of a kernel and shape that take the same on each architecture share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for (kernel, shape, dtypes), cells in sorted(table.items(), key=lambda item: item[0][:2]):
        texts = (str(cells[arch]) if arch in cells else "" for arch in CUDA_ARCHS)
        rows.setdefault((kernel, shape, *texts, cells[90].stores), []).append(dtypes)
    names = ("kernel", "shape", *(f"sm_{arch}" for arch in CUDA_ARCHS), "stores on sm_90")
    return [{**dict(zip(names, row, strict=True)), "dtypes": ", ".join(dtypes)} for row, dtypes in rows.items()]


def version(tool: str) -> str:
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels compiled at a time")
    args = parser.parse_args()
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        sys.exit("scripts/aot_table.py needs nvcc on PATH or in CUDACXX")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    tasks = [(case, arch) for arch in TRITON_ARCHS for case in aot_cases.CASES]
    table: dict[Key, Cells] = {}
    problems: list[str] = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        cuda = [(arch, pool.submit(of_cuda, nvcc, source, arch)) for arch in CUDA_ARCHS for source in sources]
        for (case, arch), (cells, wrong) in zip(tasks, pool.map(of_triton, tasks, chunksize=4), strict=True):
            _, shape, *dtypes = case.split("-")
            for kernel, cell in cells:
                known = table.setdefault((kernel, shape, " ".join(dtypes) or "fp32"), {})
                # several ops launch _column_sum_kernel, norms with and without y
                known[arch] = max(cell, known.get(arch, cell))
            problems += wrong
        for arch, future in cuda:
            found, wrong = future.result()
            for key, cell in found.items():
                table.setdefault(key, {})[arch] = cell
            problems += wrong
    rows = rows_of(table)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("kernel", "shape", "dtypes", *list(rows[0])[2:-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    ptxas = " and ".join(sorted({version(tool.path) for tool in (knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell)}))
    print(
        f"{len(table)} kernels by Triton {aot.triton.__version__}, ptxas {ptxas}, nvcc {version(nvcc)}; {TABLE.relative_to(ROOT)}"
    )
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
