"""The axis of an array that holds the channels."""

import json
from pathlib import Path

from ..errors import UserError
from .arrays import read_json


def axes_told(path: Path | None, shape: tuple[int, ...]) -> str | None:
    """Return the axes stated in the file beside an array, if there is one."""
    if path is None:
        return None
    axes = read_json(path)
    known = ("NHW",) if len(shape) == 3 else ("NHWC", "NCHW")
    if axes not in known:
        raise UserError(f"{path} must hold {' or '.join(map(json.dumps, known))} for the shape {shape}; it holds {axes!r:.40}")
    return str(axes)


def likely_axes(shape: tuple[int, ...], channels: int | None, packed: bool) -> str:
    """Guess the axes of an array from its shape; `packed`: it was written by `maefast pack`."""
    if len(shape) == 3:
        return "NHW"
    second, last = shape[1] == channels, shape[3] == channels
    if second != last:
        return "NCHW" if second else "NHWC"
    return "NCHW" if shape[1] < shape[3] and not packed else "NHWC"
