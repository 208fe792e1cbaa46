"""Tests of the kernels, on a GPU or in Triton's interpreter: TRITON_INTERPRET=1 before its import.

Ahead-of-time compilation needs neither, but a Triton that does not interpret."""

import importlib.util
from typing import Any

import numpy as np
import torch

from maefast.kernels import HAS_TRITON, INTERPRETED, OPS

if not HAS_TRITON:
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETED:
    collect_ignore_glob = ["test_aot.py", "test_launch.py"]
elif not torch.cuda.is_available():
    collect_ignore_glob = [f"test_{op}.py" for op in (*OPS, "common", "model", "tune")]

if HAS_TRITON and INTERPRETED:
    import triton
    from triton.runtime import interpreter

    _patch_tensor, _patch_lang = interpreter._patch_lang_tensor, interpreter._patch_lang
    _patched: set[int] = set()  # the modules of the language that the launch in progress has patched

    def _patch_tensor_with_scalars(tensor: type, scope: Any) -> None:
        """Triton 3.6 makes a loop's bound from an array of one element, which NumPy 2.4 refuses."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def _patch_lang_once(function: Any) -> Any:
        """Patch the language once a launch, not in each call of a function, a third of all time."""
        modules = {id(value) for value in function.__globals__.values() if value in (triton.language, triton.language.core)}
        if modules <= _patched:
            return None
        scope, outermost = _patch_lang(function), not _patched
        _patched.update(modules)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (_patched.clear(), restore())
        return scope

    def _reduce_by_halves(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
        """Combine arrays by one call, where the interpreter makes one for each value."""
        tensors, axis = self.unravel(inputs, self.axis)
        parts, types = [t.handle.data for t in tensors], [t.dtype for t in tensors]
        while (length := parts[0].shape[axis]) > 1:
            halves = [half for side in (0, 1) for half in (np.split(part, [length // 2], axis)[side] for part in parts)]
            combined = self.combine_fn.fn(*map(self.to_tensor, halves, 2 * types))
            parts = [t.handle.data for t in (combined if isinstance(combined, tuple) else (combined,))]
        assert not self.keep_dims
        return [self.to_tensor(part.squeeze(axis), dtype) for part, dtype in zip(parts, types, strict=True)]

    interpreter.ReduceOps.generic_reduce = _reduce_by_halves
    interpreter._patch_lang_tensor, interpreter._patch_lang = _patch_tensor_with_scalars, _patch_lang_once

assert importlib.util.find_spec("support"), "tests/ is not on the path: run pytest from the root of the repository"
