"""What the choice of a kernel asks of the CPU."""

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
IS_INTEL = "GenuineIntel" in _CPUINFO


def has_avx512() -> bool:
    return "avx512f" in _CPUINFO


def multiplies_bf16() -> bool:
    """Return whether the CPU has dot products of bf16 pairs."""
    return "avx512_bf16" in _CPUINFO
