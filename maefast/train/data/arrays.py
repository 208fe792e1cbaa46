"""Array files (.npy, idx) and the files beside them: labels, sizes, class names, axes."""

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import UserError, user_errors

LARGEST_UNPACKED = 768 << 20  # bytes of an unpacked array, which is held in memory
MOST_AXES = 8


def find_beside(path: Path, what: str) -> Path | None:
    """Return the `what` file beside an images file, such as labels.npy, if there is one."""
    if "images" not in path.name:
        return None
    name = path.name.replace("images", what).replace("idx3", "idx1")
    if what in ("classes", "axes"):
        name = name.split(".")[0] + ".json"
    return path.with_name(name) if path.with_name(name).exists() else None


def read_array(path: Path) -> Any:
    """Return the array in a .npy or idx file, memory-mapped unless packed. Raises UserError."""
    from numpy.lib.format import open_memmap

    try:
        return open_memmap(path, mode="r") if path.suffix == ".npy" else _idx_array(path)
    except Exception as error:  # broken bytes may raise anything
        kind = ".npy" if path.suffix == ".npy" else "an idx file"
        why = re.sub(" at 0x[0-9a-f]+", "", " ".join(str(error).split())) or type(error).__name__
        raise UserError(f"{path} cannot be read as {kind}: {why}") from error


def _idx_array(path: Path) -> Any:
    import numpy as np

    packed = path.suffix == ".gz"
    with gzip.open(path) if packed else open(path, "rb") as file:
        head = file.read(4)
        if head[:3] != b"\0\0\x08" or len(head) < 4:
            raise ValueError(f"it starts with {head[:3].hex() or 'nothing'}; idx files of uint8 start with 000008")
        if head[3] > MOST_AXES:
            raise ValueError(f"it has {head[3]} axes")
        sizes = file.read(4 * head[3])
        shape = tuple(int.from_bytes(sizes[at : at + 4], "big") for at in range(0, 4 * head[3], 4))
        start, count = 4 + 4 * head[3], math.prod(shape)
        if packed and count > LARGEST_UNPACKED:
            most = f"which must be at most {LARGEST_UNPACKED >> 20}"
            raise ValueError(f"it unpacks to {count >> 20} MiB, {most}; unpack it with gunzip")
        values = np.empty(count if packed else 0, np.uint8)
        found, rest = (file.readinto(values.data), file.read(1)) if packed else (path.stat().st_size - start, b"")
    if found != count or rest:
        raise ValueError(f"it holds {'more' if rest else found} bytes for the shape {shape}")
    return values.reshape(shape) if packed or not count else np.memmap(path, np.uint8, "r", start, shape)


def read_integers(path: Path, shape: tuple[int, ...]) -> Any:
    values = read_array(path)
    if values.dtype.kind not in "iu" or values.shape != shape:
        raise UserError(f"{path} must hold integers of the shape {shape}; it holds {values.dtype} of the shape {values.shape}")
    return values


def read_json(path: Path) -> Any:
    with user_errors(OSError, ValueError, RecursionError, prefix=f"{path} cannot be read: "):
        return json.loads(path.read_text())


def read_classes(path: Path, count: int) -> tuple[str, ...]:
    names = read_json(path)
    if not isinstance(names, list) or len(names) < count:
        raise UserError(f"{path} must hold a JSON list of {count} class names or more")
    return tuple(str(name) for name in names)
