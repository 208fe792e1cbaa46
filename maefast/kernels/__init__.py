"""The Triton backend: ops of schemas.inc as `maefast_triton::<op>` beside `maefast::<op>`.

Importing this imports no Triton. The first call of an op imports its module, which holds the
kernels and, under the name of the op, the function that launches them. The ops take tensors of any
device: Triton's interpreter runs on the CPU's.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .._library import schemas

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it: when the kernels are defined
DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)  # whose tensors the kernels take


def _op_of(name: str) -> str:
    return name.removesuffix("_fwd").removesuffix("_bwd")


_MODULES = {path.stem for path in Path(__file__).parent.glob("[!_]*.py")}
OPS = frozenset(_MODULES & {_op_of(schema.split("(")[0]) for schema in schemas()})

fragment = torch.library.Library("maefast_triton", "DEF")


@functools.cache
def _launcher(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f".{_op_of(name)}", __name__), name)


def _register(name: str) -> None:
    def launch(*args: Any) -> Any:
        return _launcher(name)(*args)

    fragment.impl(name, launch, "CompositeExplicitAutograd")


for _schema in schemas():
    _name = _schema.split("(")[0]
    if _op_of(_name) in OPS:
        fragment.define(_schema)
        _register(_name)
