"""Loads libmaefast.so, or, without one, defines the schemas of the ops in Python; what every
backend's ops share: schemas, fakes.

Where a native library is present but does not load, or is of another release, importing maefast
fails: nothing falls back silently. libmaefast_cuda.so, the kernels on GPUs, is loaded where torch
has CUDA.
"""

import ctypes
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ._version import __version__

_PACKAGE = Path(__file__).resolve().parent
_NATIVE = _PACKAGE / "libmaefast.so"
_NATIVE_CUDA = _PACKAGE / "libmaefast_cuda.so"

HAS_NATIVE = _NATIVE.exists()
HAS_CUDA = HAS_NATIVE and _NATIVE_CUDA.exists() and torch.version.cuda is not None
# Facts about the loaded objects by their file names: version, compiler, build_type, and kernels:
# CPU instruction sets, or CUDA architectures as CMake names them.
BUILD_INFO: dict[str, dict[str, str]] = {}
# of the native and of the Triton ops, the same schemas in each
NAMESPACES = ("maefast", "maefast_triton")

# Ops whose body is Python on every device. A fragment, so that it may come before or after the
# native definitions.
fragment = torch.library.Library("maefast", "FRAGMENT")


def schemas() -> list[str]:
    return re.findall(r'"(.*)"', (_PACKAGE / "schemas.inc").read_text())


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the fake of an op for every backend that has it: native and Triton return the same
    shapes and dtypes."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        for namespace in NAMESPACES:
            torch.library.register_fake(f"{namespace}::{name}", fake)
        return fake

    return register


def _load(path: Path) -> ctypes.CDLL:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"{path.name} does not load beside torch {torch.__version__}: {error}. "
            "Reinstall maefast with this torch installed, or set MAEFAST_NATIVE=0 at installation for pure Python."
        ) from error
    library = ctypes.CDLL(str(path))
    release = "another release"
    if hasattr(library, "maefast_build_info"):
        library.maefast_build_info.restype = ctypes.c_char_p
        BUILD_INFO[path.name] = json.loads(library.maefast_build_info())
        release = f"maefast {BUILD_INFO[path.name]['version']}"
    if release != f"maefast {__version__}":
        raise ImportError(
            f"{path.name} is of {release}, the Python files around it are of maefast {__version__}: reinstall maefast"
        )
    return library


def describe() -> list[str]:
    """Return one line for each native object that is loaded, or why it is not."""
    loaded = [f"{name}: {info['compiler']}, kernels for {info['kernels']}" for name, info in BUILD_INFO.items()]
    if HAS_NATIVE and not HAS_CUDA:
        loaded.append(f"{_NATIVE_CUDA.name}: " + ("not loaded, this torch has no CUDA" if _NATIVE_CUDA.exists() else "not built"))
    return loaded


if HAS_NATIVE:
    native = _load(_NATIVE)
    if HAS_CUDA:
        _load(_NATIVE_CUDA)
else:
    for _schema in schemas():
        fragment.define(_schema)
