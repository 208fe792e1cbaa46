"""Train under DDP; `torchrun ddp.py RESULTS` writes the losses, averaged over the ranks."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from joint_training import SEED, leave, make_batches, make_mae, make_optimizer, train
from torch.nn.parallel import DistributedDataParallel

from maefast.ops import _tokens


def main(results: Path) -> None:
    _tokens.REPEATED_VALUES = 0  # the small model takes every path that large ones take
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = make_batches(rank, world)

    def losses_of(batches, accumulate=False, **options):
        # Buckets are so small that several are reduced while backward runs.
        model = DistributedDataParallel(make_mae(), bucket_cap_mb=0.01)
        accumulated = {"micro_batches": 2, "unsynchronised": model.no_sync} if accumulate else {}
        torch.manual_seed(SEED + rank)
        losses = train(model, make_optimizer(model), batches, **accumulated, **options)
        dist.all_reduce(losses)
        return losses / world

    losses = {
        "pred": losses_of(batches[:4]),
        "no_pred": losses_of(batches[:4], return_pred=False),
        "accumulated": losses_of(batches, accumulate=True),
        "own_masks": losses_of([(imgs, None) for imgs, _ in batches[:4]]),
    }
    if rank == 0:
        torch.save(losses, results)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
