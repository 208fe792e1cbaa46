"""The official module's names: `import maefast.models_mae as models_mae; models_mae.__dict__[name](norm_pix_loss=True)`."""

from .model import (
    MAE,
    mae_vit_base_patch16,
    mae_vit_base_patch16_dec512d8b,
    mae_vit_huge_patch14,
    mae_vit_huge_patch14_dec512d8b,
    mae_vit_large_patch16,
    mae_vit_large_patch16_dec512d8b,
    mae_vit_small_patch16,
    mae_vit_small_patch16_dec512d8b,
    mae_vit_tiny_patch16,
    mae_vit_tiny_patch16_dec512d8b,
)

MaskedAutoencoderViT = MAE

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
