"""The official module's names: `import maefast.models_vit as models_vit; models_vit.__dict__[name](num_classes=1000)`."""

from typing import Any

from .encoder import VisionTransformer


def vit_tiny_patch16(**kwargs: Any) -> VisionTransformer:
    """ViT-Ti/16; keyword arguments are those of VisionTransformer."""
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs})


def vit_small_patch16(**kwargs: Any) -> VisionTransformer:
    """ViT-S/16; keyword arguments are those of VisionTransformer."""
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})


def vit_base_patch16(**kwargs: Any) -> VisionTransformer:
    """ViT-B/16; keyword arguments are those of VisionTransformer."""
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


def vit_large_patch16(**kwargs: Any) -> VisionTransformer:
    """ViT-L/16; keyword arguments are those of VisionTransformer."""
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **kwargs})


def vit_huge_patch14(**kwargs: Any) -> VisionTransformer:
    """ViT-H/14; keyword arguments are those of VisionTransformer."""
    return VisionTransformer(**{"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, **kwargs})


__all__ = [
    "VisionTransformer",
    "vit_base_patch16",
    "vit_huge_patch14",
    "vit_large_patch16",
    "vit_small_patch16",
    "vit_tiny_patch16",
]
