"""The linear probe: one linear layer on frozen features, behind a batch norm that centres and scales them."""

from torch import Tensor, nn

from ..encoder import VisionTransformer
from .features import pooled
from .lars import LARS
from .supervised import Recipe

HEAD_STD = 0.01


class LinearProbe(nn.Sequential):
    """BatchNorm without affine (eps 1e-6), then a linear layer: features (n, D) -> (n, classes)."""

    def __init__(self, width: int, classes: int):
        linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


class ProbedEncoder(nn.Module):
    """A probe on an encoder that stays frozen and in eval mode: images (n, C, H, W) -> (n, classes)."""

    def __init__(self, encoder: VisionTransformer, probe: LinearProbe, kind: str):
        super().__init__()
        self.encoder, self.probe, self.kind = encoder.requires_grad_(False), probe, kind

    def train(self, mode: bool = True) -> "ProbedEncoder":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, imgs: Tensor) -> Tensor:
        logits: Tensor = self.probe(pooled(self.encoder, imgs, self.kind))
        return logits


def optimizer_of(probe: LinearProbe, recipe: Recipe) -> LARS:
    return LARS(probe.parameters(), weight_decay=recipe.weight_decay)
