"""The images below a folder, its splits, and the files that are left out, with the reason."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from ..errors import UserError

# The picture formats that Pillow reads; a build of Pillow may lack some (.avif, .jp2, .webp).
EXTENSIONS = frozenset((
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".icb", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc",
    ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm",
    ".ppm", ".qoi", ".sgi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp",
))  # fmt: skip
COMMON = ".bmp .gif .jpeg .jpg .png .tif .webp, and others that Pillow reads"
OF_A_RUN = {"log.txt", "reconstructions"}  # files of a pre-training run beside its checkpoints
OF_A_SYSTEM = {"@eaDir", "__MACOSX", "$RECYCLE.BIN", "lost+found", "System Volume Information"}
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


def readable_extensions() -> frozenset[str]:
    """Return the EXTENSIONS that the installed Pillow opens; all of them if it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return EXTENSIONS
    known = Image.registered_extensions()  # this loads the formats
    return EXTENSIONS & {extension for extension, kind in known.items() if kind in Image.OPEN} | {".tif", ".tiff"}


def split_of(name: str) -> str | None:
    """Return the split that a folder of this name, such as train2017, may hold, or None."""
    bare = re.sub(r"[-_]?(19|20)\d\d$", "", name.lower())
    return next((split for split, names in SPLIT_FOLDERS.items() if bare in names), None)


def check_one_split(archive: Path, names: Iterable[str]) -> None:
    """Raise UserError if the members of an archive lie in folders of several splits."""
    folders = [name.split("/")[:-1] for name in names]
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False)))
    tops = {folder[shared] for folder in folders if len(folder) > shared}
    if len(splits := {split_of(top) for top in tops}) > 1 and None not in splits:
        raise UserError(f"{archive} must hold one split; it holds {', '.join(sorted(tops))}: give a tar file of each")


def is_hidden(name: str) -> bool:
    """Return whether a folder of this name is not part of a data set."""
    return name.startswith(".") or name in OF_A_SYSTEM


def split_of_shard(name: str) -> str | None:
    """Return the split in the name of a shard, if any. Raises UserError for two splits."""
    splits = {split for word in re.split("[^a-z]+", name.lower()) if (split := split_of(word))}
    if len(splits) > 1:
        raise UserError(f"{name} must be named after one split; its name has the words of {' and '.join(sorted(splits))}")
    return next(iter(splits), None)


def walk(root: Path, exclude: Path | None, left_out: Counter[str]) -> Iterator[Path]:
    """Yield the image files below `root`, in any order, following links but no circles.

    exclude   a folder or file to leave out; ignored if `root` lies within it
    left_out  counts the files left out, by reason; it is updated
    Raises UserError for a folder that cannot be read.
    """
    extensions, excluded = readable_extensions(), exclude and exclude.resolve()
    if excluded is not None and excluded in root.resolve().parents:
        excluded = None
    waiting = [(root, frozenset[Path]())]
    while waiting:
        folder, above = waiting.pop()
        real = folder.resolve()
        if real in above:
            continue
        if excluded is not None and (real == excluded or excluded in real.parents):
            left_out["in the folder of the output"] += sum(len(names) for *_, names in os.walk(real))
            continue
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error
        if folder != root and {entry.name for entry in entries} >= OF_A_RUN:
            left_out["in the folder of another run"] += sum(len(names) for *_, names in os.walk(real))
            continue
        for entry in entries:
            extension = os.path.splitext(entry.name)[1].lower()
            if is_hidden(entry.name):
                left_out["hidden"] += 1
            elif entry.is_dir():
                waiting.append((Path(entry.path), above | {real}))
            elif not entry.is_file():
                left_out["broken links or special files"] += 1
            elif extension not in extensions:
                left_out[f"of another format ({extension or 'no ending'})"] += 1
            elif excluded is not None and Path(entry.path).resolve() == excluded:
                left_out["written by the command"] += 1
            else:
                yield Path(entry.path)


def find_images(root: Path, exclude: Path | None = None, left_out: Counter[str] | None = None) -> list[Path]:
    """Return the files of `walk`, sorted. Raises UserError if `root` is not a readable folder, is
    `exclude`, or holds no image."""
    if not root.is_dir():
        raise UserError(f"{root} must be a folder of images; it {'is a file' if root.exists() else 'does not exist'}")
    if exclude is not None and root.resolve() == exclude.resolve():
        raise UserError(f"{root} must not be the output folder as well: its pictures would be read as images")
    found = sorted(walk(root, exclude, left_out := Counter[str]() if left_out is None else left_out))
    if not found:
        passed_over = f"; left out: {listed(left_out)}" if left_out else ""
        stacked = ": stack them into one array (N, H, W, C), images.npy" if any("(.npy)" in why for why in left_out) else ""
        raise UserError(f"{root} must hold images ({COMMON}); it holds none{passed_over}{stacked}")
    return found


def listed(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))


def holds_images(folder: Path, exclude: Path | None = None) -> bool:
    return next(walk(folder, exclude, Counter[str]()), None) is not None


def split_folders(path: Path, exclude: Path | None = None) -> dict[str, Path]:
    """Return the folder of each split; {} if there is none, or one that is a class among others.
    Raises UserError if the folders can be both."""
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not is_hidden(folder.name))
    if exclude is not None:
        written = {exclude.resolve(), exclude.resolve() / "reconstructions"}
        folders = [folder for folder in folders if folder.resolve() not in written]
    named = [folder for folder in folders if split_of(folder.name)]
    parts = {split_of(folder.name) or "": folder for folder in named}
    if len(parts) < len(named):
        raise UserError(f"{path} must have one folder for each split; it has {', '.join(folder.name for folder in named)}")
    with_images = [folder for folder in named if holds_images(folder, exclude)]  # the others hold lists, shards or arrays
    others = [f for f in folders if not split_of(f.name) and holds_images(f, exclude)] if with_images else []
    if others and len(named) == 1 and not any(f.is_dir() and holds_images(f, exclude) for f in named[0].iterdir()):
        return {}
    if others:
        raise ambiguous(path, named, others)
    return parts


def ambiguous(path: Path, named: list[Path], others: list[Path]) -> UserError:
    """Return the error for a folder whose subfolders may be splits or classes."""
    parts, rest = (", ".join(folder.name for folder in each[:5]) for each in (named, others))
    return UserError(
        f"{path} can be read in two ways: as the splits {parts}, where {rest} would be left out, or as the classes {parts} "
        f"and {rest}; give the folder of a split, such as {named[0]}, or move one of them away"
    )
