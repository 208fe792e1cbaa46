"""Images of one's own for training: `open_images` finds out what is at a path."""

import os
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UnreadableImage, UserError
from .crops import Box
from .sources import EXTENSIONS, SPLIT_FOLDERS, ArrayImages, FileImages, ImageDataset, TarImages

__all__ = ["Box", "ImageDataset", "UnreadableImage", "find_images", "folder_images", "open_images"]

IDX_NAMES = {"train": "train", "val": "t10k", "test": "t10k"}
LISTS = (".txt", ".lst")


def open_images(path: str | Path, split: str | None = None, channels: int | None = None) -> ImageDataset:
    """The images at `path`, of any kind that docs/data.md lists: folders, lists, tar shards, .npy, idx.

    split     "train", "val" or "test": that subfolder, or MNIST's pair of files; "train" is `path` itself where nothing
              there is split. None: all of a folder, the training pair of MNIST's files.
    channels  of the images that are read: 1 and 3 convert, others need as many in the file. None: what an array has; 3 for files,
              or what the first one has if it is a TIFF of more than four.
    Raises UserError when there is nothing to read, and for lists, shards and arrays that are broken as a whole.
    """
    if split is not None and split not in SPLIT_FOLDERS:
        raise ValueError(f"split must be one of {', '.join(SPLIT_FOLDERS)}; it is {split!r}")
    if channels is not None and (not isinstance(channels, int) or channels < 1):
        raise ValueError(f"channels must be 1 or more; it is {channels!r}")
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is not there")
    root = _idx_file(path, split) or _subfolder(path, split)
    if root.is_dir():
        if (root / "images.npy").is_file():
            return ArrayImages(root / "images.npy", channels)
        shards = sorted(file for file in root.glob("*.tar") if file.is_file())
        return TarImages(shards, channels) if shards else folder_images(root, channels)
    if root.suffix == ".npy" or "-ubyte" in root.name:
        return ArrayImages(root, channels)
    if root.suffix == ".tar":
        return TarImages([root], channels)
    if root.suffix in LISTS:
        return _listed_images(root, channels)
    raise UserError(f"{root} must be a folder, a list ({', '.join(LISTS)}), .tar, .npy or an idx file (*-ubyte, also .gz)")


def _idx_file(folder: Path, split: str | None) -> Path | None:
    names = (f"{IDX_NAMES[split or 'train']}-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _subfolder(path: Path, split: str | None) -> Path:
    """Where a split lies: its folder, or for "train" the path itself where there is no folder of any split."""
    if split is None:
        return path
    present = {name.lower(): path / name for name in sorted(os.listdir(path))} if path.is_dir() else {}
    present = {name: folder for name, folder in present.items() if folder.is_dir()}
    for name in SPLIT_FOLDERS[split]:
        if name in present:
            return present[name]
    if split == "train" and not any(name in present for names in SPLIT_FOLDERS.values() for name in names):
        return path
    raise UserError(f"{path} has no part for {split!r}: a folder {' or '.join(SPLIT_FOLDERS[split])}")


def find_images(root: Path, exclude: Path | None = None) -> list[Path]:
    """Image files below `root` by extension, sorted; hidden names and the folder `exclude` are left out.

    Raises UserError when `root` is no readable folder or holds no image.
    """
    if not root.is_dir():
        raise UserError(f"{root} must be a folder of images; it is {'a file' if root.exists() else 'not there'}")
    excluded, seen, found = exclude and exclude.resolve(), set[Path](), list[Path]()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen or real == excluded:  # a link back to a parent would not end
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS]
    if not found:
        raise UserError(f"{root} must hold images ({' '.join(sorted(EXTENSIONS))}); there is none below it")
    return sorted(found)


def folder_images(root: Path, channels: int | None = None, exclude: Path | None = None) -> FileImages:
    """The images below a folder. The class of one is the first folder on its way, below `train`, `val` and the like."""
    paths = find_images(root, exclude)
    labels, classes = _numbered([_class_name(path.relative_to(root)) for path in paths])
    return FileImages([str(path) for path in paths], labels, classes, channels)


def _class_name(relative: Path) -> str | None:
    folders = list(relative.parts[:-1])
    if folders and any(folders[0].lower() in names for names in SPLIT_FOLDERS.values()):
        folders.pop(0)
    return folders[0] if folders else None


def _numbered(names: list[str | None]) -> tuple[Tensor, tuple[str, ...]]:
    classes = tuple(sorted({name for name in names if name is not None}))
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([-1 if name is None else index[name] for name in names]), classes


def _listed_images(path: Path, channels: int | None) -> FileImages:
    """A line is `path` or `path label`, the path relative to the list's folder; a line that ends as an image's name has no label.

    Labels that are all numbers are the classes' own, others are names, numbered in their order.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not lines:
        raise UserError(f"{path} must list images, one a line; it is empty")
    rows = [_list_row(line) for line in lines]
    files = [str(path.parent / name) for name, _ in rows]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(f"{path} lists {len(missing)} of {len(files)} files that are not there; the first is {missing[0]}")
    names = [label for _, label in rows]
    numbers = [int(name) for name in names if name is not None and name.isascii() and name.isdigit()]
    if len(numbers) == len(names) - names.count(None):
        labels = torch.tensor([-1 if name is None else int(name) for name in names])
        classes = tuple(str(label) for label in range(int(labels.max()) + 1))
    else:
        labels, classes = _numbered(names)
    return FileImages(files, labels, classes, channels)


def _list_row(line: str) -> tuple[str, str | None]:
    name, *label = line.rsplit(maxsplit=1)
    return (line, None) if not label or Path(line).suffix.lower() in EXTENSIONS else (name, label[0])
