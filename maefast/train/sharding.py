"""Models of several processes, copied by DDP or sharded by FSDP, and their full state_dict."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..model import MAE
from .group import Group


def shard_model(model: MAE, group: Group, device: torch.device) -> None:
    """Shard weights, gradients and optimizer state in place (docs/distributed.md)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (group.world_size,))
    for module in (*model.blocks, *model.decoder_blocks, model.patch_embed, model):
        fully_shard(module, mesh=mesh)


def replicate(module: nn.Module) -> DistributedDataParallel:
    """Return the module in DistributedDataParallel, which averages gradients over the processes."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


@contextmanager
def no_sync(module: Any) -> Iterator[None]:
    """Accumulate gradients without exchanging them, for all batches of a step but the last."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def all_finite(state: Any) -> bool:
    """Return whether all floats in nested dicts and tuples, or their local shards, are finite."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in _tensors(state))
    checks = [t.isfinite().all() for t in local if t.is_floating_point()]
    devices = {check.device for check in checks}  # one synchronisation each
    return all(bool(torch.stack([check for check in checks if check.device == device]).all()) for device in devices)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


def full_state_dict(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state_dict of full tensors on the CPU. All processes must call it."""

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            return full_state_dict(value)
        return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value

    return {name: full(value) for name, value in state.items()}


def shard_state_dict(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return `state` with its tensors sharded as those of the same name and shape in `like`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def shards(value: Any, target: Any) -> Any:
        if not (isinstance(target, DTensor) and isinstance(value, Tensor) and value.shape == target.shape):
            return value
        # Each process has read the full tensor: nothing is sent.
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)

    return {name: shards(value, like[name]) if name in like else value for name, value in state.items()}


def shard_optim_state_dict(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state_dict of an optimizer with its moments sharded as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {i: shard_state_dict(entry, dict.fromkeys(entry, parameters[i])) for i, entry in state["state"].items()}
    return {**state, "state": moments}
