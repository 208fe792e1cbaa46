"""Facts about the native library and the choice of its CPU kernels, through the C functions of libmaefast.so."""

import ctypes
import json
from typing import Any

from . import _library

if not _library.HAS_NATIVE:
    raise ImportError("maefast was installed without its native library (MAEFAST_NATIVE=0)")

ISAS = ("auto", "scalar", "avx2", "avx512", "avx512bf16")

_native = ctypes.CDLL(str(_library.NATIVE))
_native.maefast_build_info.restype = _native.maefast_cpu_isa.restype = ctypes.c_char_p
_native.maefast_set_cpu_isa.argtypes, _native.maefast_set_cpu_isa.restype = (ctypes.c_char_p,), ctypes.c_bool


def build_info() -> dict[str, Any]:
    """Return the compiler, the build type, the C++ standard and the instruction sets of the CPU kernels."""
    info: dict[str, Any] = json.loads(_native.maefast_build_info())
    return info


def cpu_isa() -> str:
    """Return the instruction set that the CPU kernels use: 'avx512bf16', 'avx512', 'avx2' or 'scalar'."""
    name: bytes = _native.maefast_cpu_isa()
    return name.decode()


def set_cpu_isa(name: str) -> None:
    """Force an instruction set for the whole process; 'auto' restores the best one of this CPU."""
    if name not in ISAS or not _native.maefast_set_cpu_isa(name.encode()):
        raise ValueError(f"name must be 'auto', 'scalar', 'avx2', 'avx512' or 'avx512bf16', and run on this CPU; it is {name!r}")
