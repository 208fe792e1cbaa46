"""The linear probe of frozen features."""

import sys
from dataclasses import replace

from torch import Tensor, nn

from ...encoder import VisionTransformer
from ..data.splits import stratified_split
from .features import pooled
from .lars import LARS
from .supervised import Diverged, Recipe, count_correct, fit, in_memory

PROBE_STD = 0.01
BLRS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
HELD_OUT = 1 / 10


class LinearProbe(nn.Sequential):
    """BatchNorm without affine (eps 1e-6), then a linear layer: features (n, D) -> (n, classes)."""

    def __init__(self, width: int, classes: int):
        linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(linear.weight, std=PROBE_STD)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


class ProbedEncoder(nn.Module):
    """A probe on a frozen encoder in eval mode: images (n, C, H, W) -> (n, classes)."""

    def __init__(self, encoder: VisionTransformer, probe: LinearProbe, kind: str):
        super().__init__()
        self.encoder, self.probe, self.kind = encoder.requires_grad_(False), probe, kind

    def train(self, mode: bool = True) -> "ProbedEncoder":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, imgs: Tensor) -> Tensor:
        return self.probe(pooled(self.encoder, imgs, self.kind))


def optimizer_of(probe: LinearProbe, recipe: Recipe) -> LARS:
    return LARS(probe.parameters(), weight_decay=recipe.weight_decay)


def best_blr(features: Tensor, labels: Tensor, classes: int, recipe: Recipe, device: str = "cpu") -> float:
    """Return the smallest rate of BLRS that is best on a held-out tenth of each class.

    LARS needs greater rates for fewer steps; the official 0.1 is for 7,000 steps of 16,384 images.
    Prints the score of each rate to stderr. Raises Diverged if no rate ends with a finite loss.
    """
    train, held_out = stratified_split(labels, HELD_OUT, recipe.seed)
    batches, scored = in_memory(features[train], labels[train]), in_memory(features[held_out], labels[held_out])
    found = dict[float, int]()
    for blr in BLRS:
        tried = replace(recipe, blr=blr)
        tried = replace(tried, lr=tried.peak, batch_size=min(recipe.batch_size, len(train)))
        probe = LinearProbe(features.shape[1], classes).to(device)
        try:
            for _ in fit(probe, optimizer_of(probe, tried), batches, len(train), tried):
                pass
        except Diverged as error:
            print(f"blr {blr:g}: {error}", file=sys.stderr)
            if blr == BLRS[-1] and not found:
                raise
            continue
        found[blr] = count_correct(probe, scored, len(held_out))
        print(f"blr {blr:g}: {found[blr]} of {len(held_out)} held-out images are right", file=sys.stderr, flush=True)
    return max(found, key=lambda blr: (found[blr], -blr))
