"""The plain Masked Autoencoder under the official module's names, for scripts in which maefast does not take its place."""

from functools import partial

from torch import nn

from maefast.reference import ReferenceMAE as MaskedAutoencoderViT

mae_vit_tiny_patch16 = partial(
    MaskedAutoencoderViT,
    embed_dim=192,
    depth=12,
    num_heads=3,
    norm_layer=partial(nn.LayerNorm, eps=1e-6),
)
