"""What workers share with the test that starts them: model, batches, training, checkpoints."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import images_for, noise_for, small_mae
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import maefast

OPTIONS = {"decoder_depth": 2}
N, BATCHES = 4, 8  # images of all ranks together; batches
SEED = 11  # of rank 0, where ranks draw masks of their own
Batch = tuple[Tensor, Tensor | None]  # images (N, C, H, W) and noise (N, L)


def make_mae() -> maefast.MAE:
    return small_mae(**OPTIONS)


def make_batches(rank: int = 0, world: int = 1) -> list[Batch]:
    """Return a rank's share of each batch."""
    model, share = make_mae(), slice(rank * N // world, (rank + 1) * N // world)
    return [(images_for(model, N, seed=i)[share], noise_for(model, N, seed=100 + i)[share]) for i in range(BATCHES)]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    micro_batches: int = 1,
    unsynchronised: Callable[[], AbstractContextManager[object]] = nullcontext,
    cast: bool = False,
    **options: object,
) -> Tensor:
    """Return the loss before each step; `unsynchronised` is around all but its last micro batch."""
    losses = torch.zeros(len(batches) // micro_batches, dtype=next(model.parameters()).dtype)
    for i, (imgs, noise) in enumerate(batches):
        step, last = i // micro_batches, (i + 1) % micro_batches == 0
        with nullcontext() if last else unsynchronised():
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = model(imgs, noise=noise, **options).loss
            loss /= micro_batches
            loss.backward()
        losses[step] += loss.detach()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Into a model of any world size, sharded or not."""
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)


def leave() -> None:
    """End a worker without Python's tear-down, in which gloo's threads at times abort a process."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
