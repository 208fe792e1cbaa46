"""Random splits of labelled images."""

import torch
from torch import Tensor


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return indices (train, held_out) of labels (N,), with `fraction` of each class held out, at
    least one image in all."""
    generator = torch.Generator().manual_seed(seed)
    train, held_out = list[Tensor](), list[Tensor]()
    for label in labels.unique():
        ids = (labels == label).nonzero().flatten()
        ids = ids[torch.randperm(len(ids), generator=generator)]
        cut = round(len(ids) * fraction)
        held_out.append(ids[:cut])
        train.append(ids[cut:])
    kept, out = torch.cat(train), torch.cat(held_out)
    if not len(out):
        kept, out = kept[1:], kept[:1]
    return kept.sort().values, out.sort().values
