"""Reading and writing of checkpoint files and folders, of any model."""

import argparse
import json
import mmap
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import replace_file

WEIGHTS, THEIR_WEIGHTS, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
PREPROCESSOR = "preprocessor_config.json"
DEEPSPEED_WEIGHTS, DEEPSPEED_LATEST = "mp_rank_00_model_states.pt", "latest"
PICKLED = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
READ_SUFFIXES = (*SUFFIXES, ".ckpt")
LARGEST_JSON, LARGEST_PICKLE = 64 << 20, 16 << 20  # an object of a pickle may be of 56 bytes for one

# Packages whose objects stand beside the weights in training checkpoints, as mmengine's log does.
# An inert object replaces each; nothing of the package is imported or run.
BYSTANDERS = (
    "accelerate", "deepspeed", "easydict", "lightly", "lightning", "lightning_fabric", "lightning_utilities", "ml_collections",
    "mmcv", "mmengine", "mmpretrain", "mmselfsup", "numpy", "omegaconf", "pathlib", "pytorch_lightning", "timm", "transformers",
)  # fmt: skip

ALLOCATES = b"\nbytearray\n"  # a type that torch's unpickler makes as large as a number says


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit; the message says why in one sentence."""


class MissingPackageError(RuntimeError):
    """A package that this kind of file needs is not installed."""


@dataclass(frozen=True)
class Contents:
    """The contents of a file or folder."""

    path: Path
    entries: Mapping[Any, Any]  # as saved, tensors mapped from disk where the format allows it
    config: Mapping[str, Any]  # config.json of the folder, or empty
    size: int  # bytes of the files
    preprocessor: Mapping[str, Any] = field(default_factory=dict)  # preprocessor_config.json


def read(path: str | Path) -> Contents:
    """Return the contents of a checkpoint file, or of a folder with one or its shards.

    The first bytes of a file determine its kind. Nothing in it is run: a pickle may hold tensors,
    numbers, strings, containers, argparse.Namespace, and objects of BYSTANDERS, which are not
    created. Raises FileNotFoundError, CheckpointError for a damaged, refused or unknown file,
    MissingPackageError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _read_folder(folder: Path) -> Contents:
    config, preprocessor = (_read_json(path) if path.exists() else {} for path in (folder / CONFIG, folder / PREPROCESSOR))
    index = _only(folder, sorted(folder.glob("*.index.json")))
    if index is None:
        return replace(_read_file(_weights_of(folder)), path=folder, config=config, preprocessor=preprocessor)
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors to files of its folder")
    entries: dict[Any, Any] = {}
    size = 0
    for name in sorted(set(shards.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not in its folder")
        shard = _read_file(folder / name)
        entries |= shard.entries
        size += shard.size
    if absent := sorted(shards.keys() - entries.keys()):
        raise CheckpointError(f"{index} promises {listed(absent)}, which its files do not hold")
    return Contents(folder, entries, config, size, preprocessor)


def _weights_of(folder: Path) -> Path:
    """Return the file of a folder that holds the weights."""
    if (folder / DEEPSPEED_LATEST).is_file():
        tag = (folder / DEEPSPEED_LATEST).read_bytes()[:256].decode(errors="replace").strip()
        if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
            raise CheckpointError(f"{folder / DEEPSPEED_LATEST} must name a folder beside it; it holds {tag[:40]!r}")
        folder = folder / tag
    for name in (WEIGHTS, THEIR_WEIGHTS, DEEPSPEED_WEIGHTS):
        if (folder / name).exists():
            return folder / name
    if sharded := sorted(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise CheckpointError(
            f"{folder} holds {sharded[0].name}: DeepSpeed's ZeRO-3 shards the weights; join them with its zero_to_fp32.py"
        )
    if (folder / ".metadata").exists() and any(folder.glob("*.distcp")):
        raise CheckpointError(
            f"{folder} holds shards of torch.distributed.checkpoint; join them into one file with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        )
    weights = _only(folder, sorted(file for file in folder.iterdir() if file.suffix in READ_SUFFIXES))
    if weights is None:
        raise CheckpointError(f"{folder} holds no weights: no file in it ends in {', '.join(READ_SUFFIXES)}")
    return weights


def _only(folder: Path, files: list[Path]) -> Path | None:
    if len(files) > 1:
        raise CheckpointError(f"{folder} holds several checkpoints, {listed([file.name for file in files])}; name one of them")
    return files[0] if files else None


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path} must be at most {LARGEST_JSON >> 20} MiB of JSON; it has {path.stat().st_size >> 20} MiB")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content


def _read_file(path: Path) -> Contents:
    if not path.is_file():
        raise CheckpointError(f"{path} must be a file of weights; it is of another kind")
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK"):
        entries = _read_zip(path)
    elif head.startswith(b"\x80"):  # torch.save's format before 1.6
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(ALLOCATES) >= 0:
                raise _refusal(path, "builtins.bytearray")
        entries = _read_pickled(path, mapped=False)
    elif head[8:] == b"{":
        entries = _read_safetensors(path)
    else:
        raise CheckpointError(f"{path} is neither a file of torch.save nor of safetensors, or it is damaged")
    return Contents(path, entries, {}, path.stat().st_size)


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


def _read_zip(path: Path) -> dict[Any, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            pickles = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
            large = next((record.file_size for record in pickles if record.file_size > LARGEST_PICKLE), 0)
            allocates = not large and any(
                ALLOCATES in archive.read(record) for record in pickles if record.compress_type == zipfile.ZIP_STORED
            )
    except Exception as error:  # whatever the bytes lead the parser to
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    names = {record.filename.rpartition("/")[2] for record in records}
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript archive, which holds code; save only the state_dict with torch.save")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive that torch.save did not write: it has no data.pkl")
    # they would be mapped as they lie there
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f"{path} is a compressed zip archive; torch.save writes it without compression")
    if large:
        raise CheckpointError(f"{path} must have a pickle of at most {LARGEST_PICKLE >> 20} MiB; it has {large >> 20} MiB")
    if allocates:
        raise _refusal(path, "builtins.bytearray")
    return _read_pickled(path, mapped=True)


class _Bystander:
    """A stand-in for an object of another package in a pickle."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_pickled(path: Path, mapped: bool) -> dict[Any, Any]:
    stand_ins: dict[str, type] = {}
    while True:
        allowed: list[Any] = [argparse.Namespace, *((stand_in, name) for name, stand_in in stand_ins.items())]
        try:
            with torch.serialization.safe_globals(allowed):
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            break
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))
            name = refused[1] if refused else ""
            if name.split(".")[0] not in BYSTANDERS or name in stand_ins:
                raise _refusal(path, name, error) from error
            stand_ins[name] = OrderedDict if name.endswith("Dict") else _Bystander
        except Exception as error:  # whatever the bytes lead the unpickler to
            raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a dict of tensors; it holds a {type(loaded).__name__}")
    return loaded


def _refusal(path: Path, name: str, error: Exception | None = None) -> CheckpointError:
    if re.search(r"\b(DTensor|ShardedTensor)", str(error)):
        return sharded(path)
    if not name:
        return CheckpointError(f"{path} is damaged: {_first_line(error) if error else 'its pickle names nothing'}")
    return CheckpointError(
        f"{path} holds a {name}, which could run code when it is read, and is refused: "
        "save only the state_dict with torch.save, where the file is your own"
    )


def sharded(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} holds sharded tensors; save a full state_dict, as torch.distributed.checkpoint.state_dict's "
        "get_model_state_dict with full_state_dict=True gives it"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def write_pickled(entries: Mapping[str, Any], path: Path) -> None:
    with replace_file(path) as temporary:
        torch.save(dict(entries), temporary)


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors; overlapping ones, which the format does not have, become copies."""
    safetensors = _safetensors(path)
    dense: dict[str, Tensor] = {}
    ends: dict[int, int] = {}  # of the bytes that are written, by their start
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous()
        start, end = flat.data_ptr(), flat.data_ptr() + flat.numel() * flat.itemsize
        overlaps = any(start < other_end and other < end for other, other_end in ends.items())
        dense[name] = flat.clone() if overlaps else flat
        ends[start] = max(end, ends.get(start, 0))
    with replace_file(path) as temporary:
        safetensors.save_file(dense, temporary, metadata={"format": "pt"})


def write_json(entries: Mapping[str, Any], path: Path) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=2) + "\n")


def listed(names: list[str], most: int = 4) -> str:
    """Return the names for a sentence: of a long list the first few, and how many there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} ... ({len(names)} in all)"
