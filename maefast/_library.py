"""Load libmaefast.so, and libmaefast_cuda.so if torch has CUDA; without them, define the schemas of
the ops in Python. A library that does not load, or is of another release, is an ImportError."""

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
# by file name: version, compiler, build_type, kernels (CPU instruction sets or CUDA architectures)
BUILD_INFO: dict[str, dict[str, str]] = {}
NAMESPACES = ("maefast", "maefast_triton")  # of ops, the same schemas in each

# ops in Python; a fragment may come before or after the native definitions
fragment = torch.library.Library("maefast", "FRAGMENT")


def schemas() -> list[str]:
    return re.findall(r'"(.*)"', (_PACKAGE / "schemas.inc").read_text())


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the fake of an op for both namespaces."""

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
