"""What tests of VisionTransformer share: a small one, a plain one with its parameters, weights."""

import torch
from official import models_vit as plain_models
from torch import nn

from maefast import VisionTransformer

SMALL = {"img_size": (64, 48), "patch_size": (8, 16), "num_classes": 5, "embed_dim": 32, "depth": 3, "num_heads": 4}


def small_vit(seed: int = 0, **options: object) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(**{**SMALL, **options})


def plain_vit(seed: int = 0, **options: object) -> plain_models.VisionTransformer:
    torch.manual_seed(seed)
    return plain_models.VisionTransformer(**{**SMALL, **options})


def with_random_weights(model: nn.Module) -> nn.Module:
    """Draw larger weights than trunc_normal's 0.02, so that attention attends to something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model
