"""Random choices about images: each follows from the seed, the epoch and the index alone."""

import random

import torch


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The indices 0 .. count-1 in the order of one epoch."""
    generator = torch.Generator().manual_seed(random.Random(f"order {seed} {epoch}").getrandbits(63))
    return torch.randperm(count, generator=generator).tolist()


def draw_of(seed: int, epoch: int, index: int) -> random.Random:
    """What all that is random about one image in one epoch is drawn from."""
    return random.Random(f"{seed} {epoch} {index}")
