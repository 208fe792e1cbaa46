"""Random choices about images. Each depends only on the seed, the epoch and the index."""

import random

import torch


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Return the indices 0 .. count-1 in the order of one epoch."""
    generator = torch.Generator().manual_seed(random.Random(f"order {seed} {epoch}").getrandbits(63))
    return torch.randperm(count, generator=generator).tolist()


def draw_of(seed: int, epoch: int, index: int) -> random.Random:
    """Return the generator of all random choices about one image in one epoch."""
    return random.Random(f"{seed} {epoch} {index}")
