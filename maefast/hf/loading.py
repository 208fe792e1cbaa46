"""The files of from_pretrained (folders, files, the hub and its cache) and of save_pretrained."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import CONFIG, THEIR_WEIGHTS, WEIGHTS, write_json, write_safetensors

INDEX = ".index.json"
MODEL_TYPES = ("vit_mae", "vit")
# arguments of transformers' from_pretrained that have no meaning here, and their allowed values
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "adapter_kwargs": (None, {}),
    "distributed_config": (None,),
    "device_mesh": (None,),
    "gguf_file": (None,),
    "ignore_mismatched_sizes": (None, False),
    "key_mapping": (None,),
    "low_cpu_mem_usage": (None, False, True),
    "max_memory": (None,),
    "offload_buffers": (None, False),
    "offload_folder": (None,),
    "offload_state_dict": (None, False),
    "proxies": (None,),
    "quantization_config": (None,),
    "resume_download": (None, False, True),
    "tp_plan": (None,),
    "tp_size": (None,),
    "trust_remote_code": (None, False, True),
    "use_kernels": (None, False),
    "variant": (None,),
    "weights_only": (None, True),
}


@dataclass(frozen=True)
class Source:
    """A folder, a file, or a model of the hub, and options of the hub's client."""

    path: str | Path
    options: Mapping[str, Any]

    @property
    def local(self) -> bool:
        return Path(self.path).exists()

    def weights(self, safe: bool | None) -> Path:
        """Return the folder or file with the weights, for a model of the hub in the local cache.

        safe    True: only safetensors; False: only pickles
        Raises OSError if there are none, as transformers does.
        """
        place = Path(self.path) / self.options.get("subfolder", "") if self.local else None
        if place is not None and (place.is_file() or safe is None):
            return place
        names = {None: (WEIGHTS, THEIR_WEIGHTS), True: (WEIGHTS,), False: (THEIR_WEIGHTS,)}[safe]
        for name in (name + suffix for name in names for suffix in ("", INDEX)):
            found = place / name if place is not None else self._cached(name)
            if found is not None and found.is_file():
                if name.endswith(INDEX):
                    for shard in set(json.loads(found.read_bytes())["weight_map"].values()):
                        self._cached(shard, needed=True)
                    return found.parent
                return found.parent if (found.parent / CONFIG).exists() and safe is not False else found
        raise OSError(f"{self.path} has no file named {' or '.join(names)}")

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Turn an error of the hub's client into an OSError of one sentence."""
        try:
            yield
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"{self.path} is neither here nor given by the hub or its local cache: {reason}") from error

    def _cached(self, name: str, needed: bool = False) -> Path | None:
        from transformers.utils.hub import cached_file

        with self.asked():
            found = cached_file(str(self.path), name, **self.options, _raise_exceptions_for_missing_entries=needed)
        return None if found is None else Path(found)


def require_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError("maefast.hf needs transformers: pip install transformers") from error
    return transformers


def neutral(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not in NEUTRAL; raise ValueError for a value not in NEUTRAL."""
    for name in NEUTRAL.keys() & arguments.keys():
        if not any(arguments[name] is value or arguments[name] == value for value in NEUTRAL[name]):
            allowed = " or ".join(map(repr, NEUTRAL[name]))
            raise ValueError(f"{name} must be {allowed} for maefast; it is {arguments[name]!r}")
    return {name: value for name, value in arguments.items() if name not in NEUTRAL}


def read_config(source: Source, config: Any, overrides: dict[str, Any]) -> Any:
    """Return the configuration, given or read from `config` or beside the weights, overridden."""
    if config is not None and not isinstance(config, str | Path):
        if overrides:
            raise TypeError(f"{', '.join(overrides)} must be in config, where that is given; got both")
        return config
    if config is None and not source.path:
        raise ValueError("config must be given beside state_dict; it is None")
    where = source if config is None else Source(config, source.options)
    if where.local and Path(where.path).is_file() and config is None:
        raise ValueError(f"config must be given for a file of weights; {where.path} is one")
    options = {name: value for name, value in where.options.items() if value is not None}
    config_class = require_transformers().ViTMAEConfig
    with where.asked():
        read, unknown = config_class.from_pretrained(where.path, return_unused_kwargs=True, **options, **overrides)
    if unknown := [name for name in unknown if name in overrides]:
        raise TypeError(f"from_pretrained has no argument {', '.join(unknown)}, and ViTMAEConfig no such entry")
    if (kind := getattr(read, "model_type", None)) not in MODEL_TYPES:
        raise ValueError(f"config must be that of a ViTMAE; {where.path} has one of model_type {kind!r}")
    return read


def wanted_dtype(dtype: Any, config: Any) -> torch.dtype | None:
    """Return the dtype that `dtype` names; None leaves fp32, and "auto" is the configuration's."""
    if dtype == "auto":
        dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f'dtype must be a floating-point dtype of torch or "auto"; it is {dtype!r}')
    return dtype


def wanted_device(device_map: Any) -> torch.device | None:
    """Return the one device of a device_map."""
    if isinstance(device_map, dict) and device_map.keys() == {""}:
        device_map = device_map[""]
    if device_map is None:
        return None
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map must be None or one device for maefast; it is {device_map!r}") from error


def write(folder: Path, config: Any, tensors: Mapping[str, Tensor], max_shard_size: int | str, safe: bool) -> None:
    """Write config.json and the weights, as safetensors or pickled, in shards if larger than
    max_shard_size."""
    from huggingface_hub import split_torch_state_dict_into_shards

    name = WEIGHTS if safe else THEIR_WEIGHTS
    pattern = name.replace(".", "{suffix}.")
    plan = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size)
    config.save_pretrained(folder)
    for file, names in plan.filename_to_tensors.items():
        shard = {tensor: tensors[tensor] for tensor in names}
        if safe:
            write_safetensors(shard, folder / file)
        else:
            torch.save({tensor: value.detach().clone() for tensor, value in shard.items()}, folder / file)
    if plan.is_sharded:
        write_json({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}, folder / (name + INDEX))
