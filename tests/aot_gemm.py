"""Ahead-of-time compilation of csrc/cuda/gemm for sm_90a, without a GPU: registers, stack and
machine code of each kernel.

    python tests/aot_gemm.py [NAME...]

Needs nvcc (on PATH or in CUDACXX) and the package nvidia-cutlass. A kernel takes half a minute.
Exits with 1 where one has a problem. docs/notes/linear.md has what it prints.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GEMM = ROOT / "csrc" / "cuda" / "gemm"
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v")
REGISTERS = 168  # of a thread: 384 threads in a block, which has the multiprocessor for itself
SERIALISED = re.compile(r"C75\d\d")  # ptxas: wgmma waits for each other


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int  # bytes a thread, where spills go
    warnings: tuple[str, ...]
    instructions: Counter  # opcode with its modifiers -> how often


def sources() -> dict[str, Path]:
    """Name -> file of one instantiation."""
    return {path.stem: path for path in sorted(GEMM.glob("*.cu")) if path.stem != "linear"}


def headers() -> Path | None:
    """Return the directory of CUTLASS's headers, None if nvidia-cutlass is not installed."""
    spec = find_spec("cutlass_library")
    return Path(spec.origin).parent / "source" / "include" if spec and spec.origin else None


def compiled(nvcc: str, include: Path, name: str) -> Kernel:
    from aot import CUOBJDUMP  # imports Triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{name}.cubin"
        command = [nvcc, *FLAGS, "-isystem", include, "-cubin", sources()[name], "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}.cu does not compile for sm_90a:\n{done.stderr[-2000:]}")
        sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(\d+) bytes stack frame.*\n.*Used (\d+) registers", done.stderr)
    if len(found) != 1:
        raise RuntimeError(f"{name}.cu must have one kernel, ptxas speaks of {len(found)}")
    warnings = [line.strip() for line in done.stderr.splitlines() if "warning" in line or SERIALISED.search(line)]
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", sass, re.MULTILINE)
    return Kernel(name, int(found[0][1]), int(found[0][0]), tuple(warnings), Counter(opcodes))


def problems_of(kernel: Kernel) -> list[str]:
    found = [f"{kernel.name}: {warning}" for warning in kernel.warnings]
    if kernel.stack:
        found.append(f"{kernel.name} keeps {kernel.stack} bytes a thread in local memory")
    if kernel.registers > REGISTERS:
        found.append(f"{kernel.name} takes {kernel.registers} registers, there are {REGISTERS}")

    def named(start: str) -> dict[str, int]:
        return {opcode: count for opcode, count in kernel.instructions.items() if opcode.split(".")[0] == start}

    for opcode, what in (("HGMMA", "multiplies by wgmma"), ("UTMALDG", "reads by TMA"), ("UTMASTG", "writes by TMA")):
        if not named(opcode):
            found.append(f"nothing in {kernel.name} {what}")
    # Results go through shared memory, four 8 x 8 matrices at a time, to TMA.
    narrow = {opcode for opcode in named("STSM") if not opcode.endswith(".4")}
    # The one plain store is that of a tile's sums over tokens, one fp32 value for each feature.
    stores = {opcode for opcode in named("STG") if not (opcode == "STG.E" and "gelu_bwd" in kernel.name)}
    local = set(named("STL")) | set(named("LDL"))
    return found + [f"{kernel.name} has {opcode}" for opcode in sorted(narrow | stores | local)]


def lines_of(kernels: list[Kernel]) -> list[str]:
    """A Markdown table."""
    rows = [f"| `{k.name}` | {k.registers} / {k.stack} | {sum(k.instructions.values())} |" for k in kernels]
    return ["| file | registers / bytes of stack | instructions |", "| --- | ---: | ---: |", *rows]


def main() -> int:
    nvcc, include = os.environ.get("CUDACXX") or shutil.which("nvcc"), headers()
    if nvcc is None or include is None:
        print("tests/aot_gemm.py needs nvcc on PATH or in CUDACXX and the package nvidia-cutlass", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = list(pool.map(lambda name: compiled(nvcc, include, name), sys.argv[1:] or sources()))
    print("\n".join(lines_of(kernels)))
    problems = [problem for kernel in kernels for problem in problems_of(kernel)]
    print("\n".join(problems) or "no problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
