"""The choice of CPU kernels and facts about the native build, from libmaefast.so."""

import ctypes

from . import _library

if not _library.HAS_NATIVE:
    raise ImportError("maefast was installed without its native library (MAEFAST_NATIVE=0)")

_library.native.maefast_cpu_isa.restype = ctypes.c_char_p
_library.native.maefast_set_cpu_isa.argtypes, _library.native.maefast_set_cpu_isa.restype = (ctypes.c_char_p,), ctypes.c_bool


def build_info() -> dict[str, str]:
    """Return version, compiler, build_type and kernels, the instruction sets of the CPU kernels."""
    return _library.BUILD_INFO["libmaefast.so"]


def cpu_isa() -> str:
    """Return the CPU kernels' instruction set: 'avx512bf16', 'avx512', 'avx2' or 'scalar'."""
    name: bytes = _library.native.maefast_cpu_isa()
    return name.decode()


def set_cpu_isa(name: str) -> None:
    """Force an instruction set for the whole process; 'auto' restores the best one of this CPU."""
    known = ("auto", *build_info()["kernels"].split())
    if name not in known or not _library.native.maefast_set_cpu_isa(name.encode()):
        raise ValueError(f"name must be one of {', '.join(known)}, and run on this CPU; it is {name!r}")
