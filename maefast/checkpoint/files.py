"""Checkpoint files and folders: what is in them, and how they are written. No knowledge of any model."""

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import replace_file

WEIGHTS, THEIR_WEIGHTS, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
PICKLED = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
STATE_DICTS = ("model", "state_dict")  # the entries of a training checkpoint that hold the weights
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel's and torch.compile's


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit; the message says why in one sentence."""


class MissingPackageError(RuntimeError):
    """A package that this kind of file needs is not installed."""


@dataclass(frozen=True)
class Contents:
    """What a file or folder holds.

    tensors    by the names of the file, mapped from disk where the format allows it
    config     of config.json, or the entry `config` of the file
    args       the training script's arguments, where the file has them
    ignored    the other entries, by their names
    """

    path: Path
    tensors: dict[str, Tensor]
    config: Mapping[str, Any]
    args: Mapping[str, Any]
    ignored: Mapping[str, Any] = field(default_factory=dict)


def read(path: str | Path) -> Contents:
    """The contents of a `.pth`, `.pt`, `.bin` or `.safetensors` file, or of a folder of them with or without config.json.

    The kind of a file is told by its first bytes. Nothing that a file holds is run: a pickle may hold tensors, numbers, strings,
    containers and argparse.Namespace alone.
    Raises FileNotFoundError, CheckpointError for a file that is damaged, refused or of another kind, MissingPackageError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    contents = _read_folder(path) if path.is_dir() else _read_file(path)
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in contents.tensors.items()}
    return Contents(path, tensors, contents.config, contents.args, contents.ignored)


def _read_folder(folder: Path) -> Contents:
    config = _read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    index = _only(folder, sorted(folder.glob("*.index.json")))
    if index is None:
        named = next((folder / name for name in (WEIGHTS, THEIR_WEIGHTS) if (folder / name).exists()), None)
        weights = named or _only(folder, sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES))
        if weights is None:
            raise CheckpointError(f"{folder} holds no weights: no file in it ends in {', '.join(SUFFIXES)}")
        contents = _read_file(weights)
        return Contents(folder, contents.tensors, config or contents.config, contents.args, contents.ignored)
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors to files of its folder")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not in its folder")
        tensors |= _read_file(folder / name).tensors
    if absent := sorted(shards.keys() - tensors.keys()):
        raise CheckpointError(f"{index} promises {listed(absent)}, which its files do not hold")
    return Contents(folder, tensors, config, {})


def _only(folder: Path, files: list[Path]) -> Path | None:
    if len(files) > 1:
        raise CheckpointError(f"{folder} holds several checkpoints, {listed([file.name for file in files])}; name one of them")
    return files[0] if files else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content


def _read_file(path: Path) -> Contents:
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK"):
        return _read_pickled(path, mapped=True)
    if head.startswith(b"\x80"):  # torch.save's format before 1.6
        return _read_pickled(path, mapped=False)
    if head[8:] == b"{":
        return Contents(path, _read_safetensors(path), {}, {})
    raise CheckpointError(f"{path} is neither a file of torch.save nor of safetensors, or it is damaged")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = _safetensors(path)
    try:
        return safetensors.load_file(path)
    except Exception as error:  # whatever the bytes lead the parser to
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error


def _safetensors(path: Path) -> Any:
    try:
        import numpy  # noqa: F401  safetensors writes tensors through it
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError(f'{path} needs {error.name}: pip install "maefast[checkpoints]"') from error
    return safetensors.torch


def _read_pickled(path: Path, mapped: bool) -> Contents:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
        raise CheckpointError(
            f"{path} holds a {refused[1]}, which could run code when it is read, and is refused: "
            "save the state_dict alone with torch.save, where the file is your own"
        ) from error
    except Exception as error:  # whatever the bytes lead the unpickler to
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a dict of tensors; it holds a {type(loaded).__name__}")
    chosen = next((name for name in STATE_DICTS if _is_state_dict(loaded.get(name))), None)
    if chosen is None:
        if not _is_state_dict(loaded):
            raise CheckpointError(f"{path} holds no state_dict, neither as {' nor as '.join(STATE_DICTS)} nor by itself")
        return Contents(path, loaded, {}, {})
    args = loaded.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    config, args = (entry if isinstance(entry, dict) else {} for entry in (loaded.get("config"), args))
    ignored = {name: entry for name, entry in loaded.items() if name not in (chosen, "config", "args")}
    return Contents(path, loaded[chosen], config, args, ignored)


def _is_state_dict(entry: object) -> bool:
    if not isinstance(entry, dict) or not entry:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entry.items())


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def write_pickled(entries: Mapping[str, Any], path: Path) -> None:
    with replace_file(path) as temporary:
        torch.save(dict(entries), temporary)


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    safetensors = _safetensors(path)
    dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replace_file(path) as temporary:
        safetensors.save_file(dense, temporary, metadata={"format": "pt"})


def write_json(entries: Mapping[str, Any], path: Path) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=2) + "\n")


def listed(names: list[str], most: int = 4) -> str:
    """The names in a sentence; of a long list the first few, and how many there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} ... ({len(names)} in all)"
