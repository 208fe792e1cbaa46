"""The CPU kernels' instruction set: the widest, or the one that MAEFAST_CPU_ISA forces."""

import os
from pathlib import Path

from . import _library

VARIABLE = "MAEFAST_CPU_ISA"
ISAS = ("avx512bf16", "avx512", "avx2", "scalar")  # widest first; avx512bf16 is AVX-512 with dot products of bf16 pairs
NO_NATIVE = "maefast was installed without its native library (MAEFAST_NATIVE=0)"

_CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
IS_INTEL = "GenuineIntel" in _CPUINFO


def _force(name: str) -> str | None:
    """Force an instruction set and return the one in use, None without the native library."""
    if name not in ("auto", *ISAS):
        raise ValueError(f"{VARIABLE} must be one of auto, {', '.join(ISAS)}; it is {name!r}")
    if not _library.HAS_NATIVE:
        if name != "auto":
            raise RuntimeError(f"{VARIABLE} asks for {name}: {NO_NATIVE}")
        return None
    from ._C import cpu_isa, set_cpu_isa

    try:
        set_cpu_isa(name)
    except ValueError:
        raise RuntimeError(f"{VARIABLE} asks for {name}: the widest instruction set of this CPU is {cpu_isa()}") from None
    return cpu_isa()


_ISA = _force(os.environ.get(VARIABLE, "auto"))


def has_avx512() -> bool:
    """Return whether the kernels of this process use AVX-512."""
    return _ISA in ("avx512bf16", "avx512")


def multiplies_bf16() -> bool:
    """Return whether the kernels of this process use dot products of bf16 pairs."""
    return _ISA == "avx512bf16"


def describe() -> str:
    """Return the instruction set of the CPU kernels, and whether it was forced, in one line."""
    if _ISA is None:
        return f"CPU kernels: none, {NO_NATIVE}"
    from ._C import cpu_isa

    forced = os.environ.get(VARIABLE, "auto") != "auto"
    return f"CPU kernels: {cpu_isa()}, " + (f"forced by {VARIABLE}" if forced else "the widest instruction set of this CPU")
