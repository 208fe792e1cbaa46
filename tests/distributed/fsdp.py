"""Train under fully_shard; `torchrun fsdp.py RESULTS ONE TWO` writes losses averaged over ranks.

ONE  a checkpoint of one process after two steps, to go on from
TWO  where the same is saved from here
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from joint_training import leave, make_batches, make_mae, make_optimizer, resume, save, train
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from maefast.blocks import Block
from maefast.ops import _tokens


def by_blocks(model: nn.Module, shard: Callable[[nn.Module], object]) -> nn.Module:
    """The usual units: each block, the patch embedding, and what the model itself holds."""
    for module in (*model.blocks, *model.decoder_blocks, model.patch_embed, model):
        shard(module)
    return model


def every_module(model: nn.Module, shard: Callable[[nn.Module], object]) -> nn.Module:
    for module in reversed(list(model.modules())):
        if not isinstance(module, nn.ModuleList):
            shard(module)
    return model


def checkpointed(model: nn.Module, shard: Callable[[nn.Module], object]) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return by_blocks(model, shard)


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def main(results: Path, one: Path, two: Path) -> None:
    _tokens.REPEATED_VALUES = 0  # the small model takes every path that large ones take
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    shard = partial(fully_shard, mesh=mesh)
    batches = make_batches(rank, world)

    def averaged(losses: Tensor) -> Tensor:
        dist.all_reduce(losses)
        return losses / world

    def gathered(rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def losses_of(apply, batches=batches[:4], **options):
        model = apply(make_mae(), shard)
        if "micro_batches" in options:
            options["unsynchronised"] = partial(unsynchronised, model)
        return averaged(train(model, make_optimizer(model), batches, **options))

    written = {
        "pred": losses_of(by_blocks),
        "no_pred": losses_of(by_blocks, return_pred=False),
        "every_module": losses_of(every_module),
        "every_module_no_pred": losses_of(every_module, return_pred=False),
        "checkpointed": losses_of(checkpointed, return_pred=False),
        "accumulated": losses_of(by_blocks, batches, micro_batches=2),
        "autocast": losses_of(by_blocks, cast=True),
    }

    model = by_blocks(make_mae(), shard)
    optimizer = make_optimizer(model)
    train(model, optimizer, batches[:2])
    save(model, optimizer, two)
    model = by_blocks(make_mae(), shard)
    optimizer = make_optimizer(model)
    resume(model, optimizer, one)
    written["from_one"] = averaged(train(model, optimizer, batches[2:4]))

    model = by_blocks(make_mae(), shard)
    register_fsdp_forward_method(model, "encode")
    imgs, noise = batches[0]
    with torch.no_grad():
        written["encode"] = gathered(model.encode(imgs))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = by_blocks(make_mae(), partial(shard, mp_policy=bf16))
    mask = (noise.argsort(dim=1).argsort(dim=1) >= 6).float()  # 0 and 1 outlive the cast to bf16, noise would not
    out = model(imgs, mask=mask)
    out.loss.backward()
    written["bf16"] = gathered(out.pred.detach())
    assert model.cls_token.grad.dtype == torch.float32
    if rank == 0:
        torch.save(written, results)
    leave()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
