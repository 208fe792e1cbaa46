"""The fused ops of Masked Autoencoder training; each module holds contract, reference, fakes."""

from .add_layer_norm import add_layer_norm, add_layer_norm_ref
from .attention import attention, attention_ref
from .bias_gelu import bias_gelu, bias_gelu_ref
from .gather_patches import gather_patches, gather_patches_ref
from .layer_norm import layer_norm, layer_norm_ref
from .linear import linear, linear_ref
from .mask_patches import mask_patches, mask_patches_ref
from .masked_mse import masked_mse, masked_mse_ref
from .masking_noise import masking_noise
from .random_masking import len_keep, random_masking, random_masking_ref
from .transformer_block import BlockWeights, transformer_block, transformer_block_ref
from .unshuffle import unshuffle, unshuffle_ref

__all__ = [
    "BlockWeights",
    "add_layer_norm",
    "add_layer_norm_ref",
    "attention",
    "attention_ref",
    "bias_gelu",
    "bias_gelu_ref",
    "gather_patches",
    "gather_patches_ref",
    "layer_norm",
    "layer_norm_ref",
    "len_keep",
    "linear",
    "linear_ref",
    "mask_patches",
    "mask_patches_ref",
    "masked_mse",
    "masked_mse_ref",
    "masking_noise",
    "random_masking",
    "random_masking_ref",
    "transformer_block",
    "transformer_block_ref",
    "unshuffle",
    "unshuffle_ref",
]
