"""Loads libmaefast.so, or, without one, defines the schemas of the ops in Python; what every backend's ops share: schemas, fakes.

Where a native library is present but does not load, importing maefast fails: nothing falls back silently.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
NATIVE = _PACKAGE / "libmaefast.so"

HAS_NATIVE = NATIVE.exists()
# Whether the native library has kernels for GPUs; set below, once it is loaded.
HAS_CUDA = False
NAMESPACES = ("maefast", "maefast_triton")  # of the native and of the Triton ops, the same schemas in each

# Ops whose body is Python on every device. A fragment, so that it may come before or after the native definitions.
fragment = torch.library.Library("maefast", "FRAGMENT")


def schemas() -> list[str]:
    return re.findall(r'"(.*)"', (_PACKAGE / "schemas.inc").read_text())


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the fake of an op that Triton has too: what shapes and dtypes it gives, the same for every backend."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        for namespace in NAMESPACES:
            torch.library.register_fake(f"{namespace}::{name}", fake)
        return fake

    return register


if HAS_NATIVE:
    try:
        torch.ops.load_library(str(NATIVE))
    except OSError as error:
        raise ImportError(
            f"{NATIVE.name} does not load beside torch {torch.__version__}: {error}. "
            "Reinstall maefast with this torch installed, or set MAEFAST_NATIVE=0 at installation for pure Python."
        ) from error
    HAS_CUDA = torch._C._dispatch_has_kernel_for_dispatch_key("maefast::attention_fwd", "CUDA")
else:
    for _schema in schemas():
        fragment.define(_schema)
