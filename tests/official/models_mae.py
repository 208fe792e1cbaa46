"""The plain Masked Autoencoder under the official module's names, for scripts without maefast."""

from functools import partial

from torch import nn

from maefast.reference import ReferenceMAE as MaskedAutoencoderViT

SIZES = {"embed_dim": 192, "depth": 12, "num_heads": 3}
mae_vit_tiny_patch16 = partial(MaskedAutoencoderViT, **SIZES, norm_layer=partial(nn.LayerNorm, eps=1e-6))
