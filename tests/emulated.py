"""CUDA sources compiled for the CPU beside tests/cuda_emulator, and the ops that they register."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import NATIVE

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "cuda_emulator"
TORCH = Path(torch.__file__).parent
CXX = shutil.which("g++")
FLAGS = [
    *("-std=c++20", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror", f"-I{HERE}", "-isystem", TORCH / "include"),
    *("-DMAEFAST_ENTRY", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"),
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
]
needs_emulator = pytest.mark.skipif(CXX is None or not NATIVE, reason="needs g++ and the native library, which defines the ops")


def compiled(folder: Path, sources: Sequence[Path], *more: str) -> ctypes.CDLL:
    """Load the sources and the emulator as one library, in which misaligned access is fatal."""

    def run(*arguments: str | Path) -> None:
        done = subprocess.run([CXX, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    def compiled(source: Path) -> Path:
        run(*FLAGS, *more, "-x", "c++", "-c", source, "-o", folder / f"{source.stem}.o")
        return folder / f"{source.stem}.o"

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [HERE / "emulator.cpp", *sources]))
    library = folder / "libemulated.so"
    run("-shared", *objects, "-Wl,-Bsymbolic", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", library)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def linked(folder: Path) -> Path:
    """Make a tree of links to the sources and return its csrc/cuda. mma.cuh, whose PTX no CPU runs,
    and gemm/multiply.cuh, whose wgmma none does, are the emulator's there."""
    cuda = folder / "csrc" / "cuda"
    (cuda / "gemm").mkdir(parents=True)
    (folder / "maefast").symlink_to(ROOT / "maefast")
    replaced = {"mma.cuh": cuda, "multiply.cuh": cuda / "gemm", "attention_c.cpp": cuda}
    for path in (ROOT / "csrc").rglob("*.*"):
        there = folder / path.relative_to(ROOT)
        if there.parent.is_dir() and path.name not in replaced:
            there.symlink_to(path)
    for name, there in replaced.items():
        (there / name).symlink_to(HERE / name)
    return cuda


class _CudaOps:
    """torch.ops.maefast, but with the kernels that are registered for CUDA."""

    def __getattr__(self, name: str):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return lambda *args: getattr(torch.ops.maefast, name).default.redispatch(keys, *args)


cuda = _CudaOps()
