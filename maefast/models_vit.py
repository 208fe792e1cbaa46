"""The official module's names: `models_vit.__dict__[name](num_classes=1000)`."""

from collections.abc import Callable
from typing import Any

from .encoder import VisionTransformer


def _factory(size: str, doc: str, patch_size: int, **sizes: int) -> Callable[..., VisionTransformer]:
    def make(**kwargs: Any) -> VisionTransformer:
        return VisionTransformer(**{"patch_size": patch_size, **sizes, **kwargs})

    make.__name__ = make.__qualname__ = f"vit_{size}_patch{patch_size}"
    make.__doc__ = f"{doc}; keyword arguments are those of VisionTransformer."
    return make


vit_tiny_patch16 = _factory("tiny", "ViT-Ti/16", 16, embed_dim=192, depth=12, num_heads=3)
vit_small_patch16 = _factory("small", "ViT-S/16", 16, embed_dim=384, depth=12, num_heads=6)
vit_base_patch16 = _factory("base", "ViT-B/16", 16, embed_dim=768, depth=12, num_heads=12)
vit_large_patch16 = _factory("large", "ViT-L/16", 16, embed_dim=1024, depth=24, num_heads=16)
vit_huge_patch14 = _factory("huge", "ViT-H/14", 14, embed_dim=1280, depth=32, num_heads=16)

__all__ = [
    "VisionTransformer",
    "vit_base_patch16",
    "vit_huge_patch14",
    "vit_large_patch16",
    "vit_small_patch16",
    "vit_tiny_patch16",
]
