"""Masked Autoencoder pre-training at the speed of the hardware, behind the official API."""

from . import _torch, ops, reference  # noqa: F401  # _torch first: it refuses a torch that is too old
from ._version import __version__
from .encoder import VisionTransformer
from .explain import explain
from .model import MAE
from .models_mae import (
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
from .pyramid import SimpleFeaturePyramid
from .request import backend

__all__ = [
    "MAE",
    "SimpleFeaturePyramid",
    "VisionTransformer",
    "__version__",
    "backend",
    "explain",
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
    "ops",
]
