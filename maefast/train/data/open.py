"""Data sets of images: `open_images` detects the kind of data at a path."""

import sys
from collections import Counter, defaultdict
from collections.abc import Collection
from itertools import chain
from pathlib import Path

from ..errors import UnreadableImage, UserError
from .crops import Box
from .folders import SPLIT_FOLDERS, ambiguous, find_images, readable_extensions, split_folders, split_of, split_of_shard, walk
from .labels import named
from .lists import LISTS, listed_images
from .sources import ArrayImages, FileImages, ImageDataset, TarImages

__all__ = ["Box", "ImageDataset", "UnreadableImage", "find_images", "folder_images", "open_images", "open_part", "tell"]

IDX_NAMES = {"train": "train", "val": "t10k", "test": "t10k"}


def open_images(
    path: str | Path, split: str | None = None, channels: int | None = None, exclude: Path | None = None
) -> ImageDataset:
    """Open the images at `path`: a folder, list, tar shards, .npy or idx (docs/data.md).

    split     "train", "val" or "test": the subfolder, list, shards or MNIST files of that name;
              "train" is `path` itself if nothing is named after a split. None: all of a folder
    channels  1, 3 or 4 convert images; another number must be the file's. None: an array's own
              number; 3 for files, or the number of bands if the first file is a TIFF of bands
    exclude   a folder or file below `path` to leave out, such as the output of a run
    Raises UserError if there is nothing to read, if a folder can be read in two ways, and for a
    broken list, shard or array.
    """
    if split is not None and split not in SPLIT_FOLDERS:
        raise ValueError(f"split must be one of {', '.join(SPLIT_FOLDERS)}; it is {split!r}")
    if channels is not None and (not isinstance(channels, int) or channels < 1):
        raise ValueError(f"channels must be 1 or more; it is {channels!r}")
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    root = path if split is None else _part(path, split, exclude)
    images, chosen = _opened(path, root, split, channels, exclude)
    what = f"split {split}" if chosen or root != path else "all of it"
    images.source = f"{root} ({images.kind}, {what})"
    if root != path and root.is_dir() and (beside := sum(1 for _ in _image_files(path, exclude))):
        images.left_out["beside the splits"] += beside
    return images


def open_part(path: Path, split: str, channels: int | None, exclude: Path | None = None) -> ImageDataset:
    """Open a split of `path` if it is a folder with splits, otherwise all of it."""
    return open_images(path, split if path.is_dir() and _parts(path, exclude) else None, channels, exclude)


def tell(*opened: ImageDataset) -> None:
    """Print a line about each opened data set to stderr."""
    for images in opened:
        if isinstance(images, ImageDataset):  # other objects with its methods are allowed
            print(images.described(), file=sys.stderr, flush=True)


def _opened(path: Path, root: Path, split: str | None, channels: int | None, exclude: Path | None) -> tuple[ImageDataset, bool]:
    """Return the images at `root`, `path` or its split, and whether `split` chose among others."""
    split = split if root == path else None
    if root.is_dir():
        left_out = Counter[str]()
        idx, array, shards = _idx_file(root, split), root / "images.npy", _shards(root)
        image = next(walk(root, exclude, left_out), None)
        examples = (idx, array if array.is_file() else None, shards[0] if shards else None, image)
        kinds = zip(("idx files", "the array", "tar files", "image files"), examples, strict=True)
        found = [f"{kind} ({example.name})" for kind, example in kinds if example]
        if len(found) > 1:
            ways = f"{found[0]} or {found[1]}; give the path of one, or move the other away"
            raise UserError(f"{root} can be read in two ways: {ways}")
        if idx:
            return ArrayImages(idx, channels), split is not None
        if array.is_file():
            return ArrayImages(array, channels), False
        if shards:
            left_out["of another format (.tar)"] -= len(shards)
            return _shards_of(root, shards, split, channels, +left_out)
        listed = [file for file in _lists(root) if image is None and (file.stem == "list" or split_of(file.stem))]
        if len(listed) != 1:
            return folder_images(root, channels, exclude, is_part=root != path), False
        root = listed[0]
    if root.suffix == ".npy" or "-ubyte" in root.name:
        return ArrayImages(root, channels), False
    if root.suffix == ".tar":
        return TarImages([root], channels), False
    if root.suffix in LISTS:
        return listed_images(root, channels), False
    raise UserError(f"{root} must be a folder, a list ({', '.join(LISTS)}), .tar, .npy or an idx file (*-ubyte, also .gz)")


def _idx_file(folder: Path, split: str | None) -> Path | None:
    names = (f"{IDX_NAMES[split or 'train']}-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.tar") if file.is_file())


def _lists(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in LISTS and file.is_file())


def _image_files(folder: Path, exclude: Path | None) -> list[Path]:
    """Return the image files directly in a folder."""
    extensions = readable_extensions()
    files = (file for file in folder.iterdir() if file.suffix.lower() in extensions and not file.name.startswith("."))
    return [file for file in files if file.is_file() and file != exclude]


def _parts(path: Path, exclude: Path | None) -> dict[str, list[Path]]:
    """Return the subfolder, list, first shard and idx file of each split. Raises UserError."""
    parts = defaultdict[str, list[Path]](list)
    for name, folder in split_folders(path, exclude).items():
        parts[name].append(folder)
    for file in _lists(path):
        if split := split_of(file.stem):
            parts[split].append(file)
    shards = {split_of_shard(shard.name): shard for shard in reversed(_shards(path))}
    for name in SPLIT_FOLDERS:
        parts[name] += filter(None, (shards.get(name), _idx_file(path, name)))
    return {name: places for name, places in parts.items() if places}


def _part(path: Path, split: str, exclude: Path | None) -> Path:
    """Return the place of a split, `path` for "train" without splits. Raises UserError."""
    if not path.is_dir() and split == "train":
        return path
    names = SPLIT_FOLDERS[split]
    missing = f"{path} has no {split!r} split, such as a folder {' or '.join(names)}"
    if not path.is_dir():
        raise UserError(missing)
    here = [folder for folder in path.iterdir() if folder.is_dir() and split_of(folder.name) == split]
    try:
        parts = _parts(path, exclude)
    except UserError as error:
        raise (error if here else UserError(f"{missing}; {error}")) from error
    if places := parts.get(split):
        if len(places) > 1:
            ways = " or ".join(map(str, places))
            raise UserError(f"{path} can be read in two ways: its {split!r} split may be {ways}; give the path of one")
        return places[0] if places[0].is_dir() or places[0].suffix in LISTS else path
    if split == "train" and not parts:
        return path
    if here:
        raise ambiguous(path, here, sorted(folder for folder in path.iterdir() if folder.is_dir() and folder != here[0]))
    of_shards = [place.name for place in chain(*parts.values()) if place.suffix == ".tar"]
    raise UserError(f"{missing}; its shards belong to other splits, such as {of_shards[0]}" if of_shards else missing)


def _shards_of(
    root: Path, shards: list[Path], split: str | None, channels: int | None, left_out: Counter[str]
) -> tuple[TarImages, bool]:
    """Return the shards of a split, all of them if their names hold none, and whether they do."""
    splits = [None if split is None else split_of_shard(shard.name) for shard in shards]
    named = any(splits)
    if named and None in splits:
        others = f"others, such as {shards[splits.index(None)].name}, do not and may or may not belong to {split!r}"
        raise UserError(f"{root} can be read in two ways: the names of some shards contain a split, {others}")
    chosen = [shard for shard, its in zip(shards, splits, strict=True) if its == split or not named]
    images = TarImages(chosen, channels)
    images.left_out += left_out
    if rest := len(shards) - len(chosen):
        images.left_out["shards of other splits"] += rest
    return images, named


def folder_images(root: Path, channels: int | None = None, exclude: Path | None = None, *, is_part: bool = False) -> FileImages:
    """Open the images below a folder. Their class is the first folder of the path, below folders of
    splits; with `is_part`, `root` is a split and all folders in it are classes."""
    left_out = Counter[str]()
    paths = find_images(root, exclude, left_out)
    parts = set() if is_part else {folder.name for folder in split_folders(root, exclude).values()}
    labels, classes = named([_class_name(path.relative_to(root), parts) for path in paths])
    images = FileImages([str(path) for path in paths], labels, classes, channels)
    images.source, images.left_out = f"{root} ({images.kind}, all of it)", left_out
    return images


def _class_name(relative: Path, parts: Collection[str]) -> str | None:
    folders = relative.parts[:-1]
    return next(iter(folders[1:] if folders and folders[0] in parts else folders), None)
