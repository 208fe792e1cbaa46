"""Loads libmaefast.so; without one, defines the schemas of the ops in Python, so that other backends can be registered on them.

Where a native library is present but does not load, importing maefast fails: nothing falls back silently.
"""

import re
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent
_NATIVE = _PACKAGE / "libmaefast.so"

HAS_NATIVE = _NATIVE.exists()

# Ops whose body is Python on every device. A fragment, so that it may come before or after the native definitions.
fragment = torch.library.Library("maefast", "FRAGMENT")


def _define_schemas() -> None:
    for schema in re.findall(r'"(.*)"', (_PACKAGE / "schemas.inc").read_text()):
        fragment.define(schema)


if HAS_NATIVE:
    try:
        torch.ops.load_library(str(_NATIVE))
    except OSError as error:
        raise ImportError(
            f"{_NATIVE.name} does not load beside torch {torch.__version__}: {error}. "
            "Reinstall maefast with this torch installed, or set MAEFAST_NATIVE=0 at installation for pure Python."
        ) from error
else:
    _define_schemas()
