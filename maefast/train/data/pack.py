"""`maefast pack`: images as one uint8 array, from which random crops are read without decoding.

Decoding is most of the cost of reading (docs/data.md). All images of the array have one size, so
each is stretched, by default to a square. sizes.npy stores the original sizes; a crop is chosen in
pixels of the original and read from the matching part of the array.
"""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._files import replace_file
from ..errors import UserError
from .crops import Size
from .open import open_images, tell
from .sources import ArrayImages, ImageDataset


def pack(source: Path, out: Path, *, split: str | None = None, size: int | Size = 256, channels: int | None = None) -> int:
    """Write the folder `out` and return its number of images n: images.npy (n, *size, C) uint8,
    axes.json, sizes.npy (n, 2), labels.npy (n,), classes.json.

    Unreadable images are left out and printed. Raises UserError, with nothing written, if no image
    can be read, `out` exists, or its disk is too small.
    """
    if out.exists():
        raise UserError(f"{out} must be a folder that does not exist yet; it exists")
    height, width = (size, size) if isinstance(size, int) else size
    data = open_images(source, split, channels)
    if isinstance(data, ArrayImages):
        raise UserError(f"{source} must be images to pack; {data.path} is an array already")
    try:
        with replace_file(out) as temporary:
            temporary.mkdir()
            _check_space(temporary, len(data) * height * width * data.channels)
            count = _write(data, temporary, (height, width))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    for failure in sorted(data.skipped.values(), key=lambda failure: failure.path):
        print(f"skipped {failure}")
    stored = (out / "images.npy").stat().st_size
    print(f"{out}: {count} images of {height} x {width}, {stored / 1e6:.1f} MB, unreadable images skipped: {len(data.skipped)}")
    return count


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        must = f"must have {needed / 1e9:.1f} GB of free space for the images"
        raise UserError(f"{folder.parent} {must}; it has {free / 1e9:.1f} GB")


def _write(data: ImageDataset, folder: Path, size: Size) -> int:
    import numpy as np

    shape = (*size, data.channels)
    kept, sizes = list[int](), list[tuple[int, int]]()
    with open(folder / "images.npy", "wb") as file:
        _write_header(file, (len(data), *shape))
        for index, image, stored_size in _squares(data, size):
            if not kept:
                tell(data)
            file.write(image.permute(1, 2, 0).contiguous().numpy().data)
            kept.append(index)
            sizes.append(stored_size)
        if not kept:
            first = next(iter(data.skipped.values()))
            raise UserError(f"{data.source} must hold images that can be read; none of {len(data)} can be, such as {first}")
        file.seek(0)
        _write_header(file, (len(kept), *shape))
    np.save(folder / "sizes.npy", np.array(sizes, np.int32))
    (folder / "axes.json").write_text('"NHWC"\n')
    if data.classes:
        np.save(folder / "labels.npy", data.labels[kept].numpy())
        (folder / "classes.json").write_text(json.dumps(data.classes) + "\n")
    return len(kept)


def _write_header(file: Any, shape: tuple[int, ...]) -> None:
    """Write the header of a uint8 .npy file; NumPy pads it to one length for any number."""
    import numpy as np

    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _squares(data: ImageDataset, size: Size) -> Iterator[tuple[int, Tensor, tuple[int, int]]]:
    """Yield index, pixels and original (height, width) of each readable image; all cores decode."""

    def square(index: int) -> tuple[Tensor | None, list[tuple[int, int]]]:
        seen = list[tuple[int, int]]()

        def whole(height: int, width: int) -> tuple[int, int, int, int]:
            seen.append((height, width))
            return 0, 0, width, height

        return data.try_read(index, size, whole), seen

    indices = iter(range(len(data)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(indices, 256)):
            for index, (image, seen) in zip(chunk, pool.map(square, chunk), strict=True):
                if image is not None:
                    yield index, image, seen[0]
