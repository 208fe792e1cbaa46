"""The official module's names: `models_mae.__dict__[name](norm_pix_loss=True)`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .model import MAE

MaskedAutoencoderViT = MAE


def _factory(size: str, doc: str, patch_size: int, **sizes: int) -> Callable[..., MAE]:
    decoder = {"decoder_embed_dim": 512, "decoder_num_heads": 16, "decoder_depth": 8}
    defaults = {"patch_size": patch_size, "mlp_ratio": 4.0, "norm_layer": partial(nn.LayerNorm, eps=1e-6), **sizes, **decoder}

    def make(*, model_class: type[MAE] = MAE, **kwargs: Any) -> MAE:
        return model_class(**{**defaults, **kwargs})

    make.__name__ = make.__qualname__ = f"mae_vit_{size}_patch{patch_size}_dec512d8b"
    make.__doc__ = f"{doc}; keyword arguments are those of MAE. model_class: MAE or a subclass, which is built."
    return make


mae_vit_tiny_patch16_dec512d8b = _factory("tiny", "ViT-Ti/16", 16, embed_dim=192, depth=12, num_heads=3)
mae_vit_small_patch16_dec512d8b = _factory("small", "ViT-S/16", 16, embed_dim=384, depth=12, num_heads=6)
mae_vit_base_patch16_dec512d8b = _factory("base", "ViT-B/16", 16, embed_dim=768, depth=12, num_heads=12)
mae_vit_large_patch16_dec512d8b = _factory("large", "ViT-L/16", 16, embed_dim=1024, depth=24, num_heads=16)
mae_vit_huge_patch14_dec512d8b = _factory("huge", "ViT-H/14", 14, embed_dim=1280, depth=32, num_heads=16)
mae_vit_tiny_patch16 = mae_vit_tiny_patch16_dec512d8b
mae_vit_small_patch16 = mae_vit_small_patch16_dec512d8b
mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b

__all__ = [
    "MaskedAutoencoderViT",
    "mae_vit_base_patch16",
    "mae_vit_base_patch16_dec512d8b",
    "mae_vit_huge_patch14",
    "mae_vit_huge_patch14_dec512d8b",
    "mae_vit_large_patch16",
    "mae_vit_large_patch16_dec512d8b",
    "mae_vit_small_patch16",
    "mae_vit_small_patch16_dec512d8b",
    "mae_vit_tiny_patch16",
    "mae_vit_tiny_patch16_dec512d8b",
]
