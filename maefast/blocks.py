"""The building blocks of a Vision Transformer, with the field's parameter names. MAE calls these and the ops, nothing else."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .reference import pair


class PatchEmbed(nn.Module):
    """Patches to tokens. Only the patches that are asked for are read from the image and multiplied.

    `proj` is a Conv2d for the sake of its parameters' names, shapes and initialisation; it runs as one GEMM.
    """

    def __init__(self, img_size: int | tuple[int, int], patch_size: int | tuple[int, int], in_chans: int, embed_dim: int):
        super().__init__()
        self.img_size, self.patch_size = pair(img_size, "img_size"), pair(patch_size, "patch_size")
        (H, W), (ph, pw) = self.img_size, self.patch_size
        if H % ph or W % pw:
            raise ValueError(f"img_size must be a multiple of patch_size; {H} x {W} is no multiple of {ph} x {pw}")
        self.grid_size = (H // ph, W // pw)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size)

    def forward(
        self,
        imgs: Tensor,
        ids: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> Tensor:
        """imgs (N, C, H, W), ids (N, K) or None for all patches in row-major order -> (N, K or L, D), no positions added.

        uint8 images are read as (x/255 - mean)/std.
        """
        self.check(imgs)
        weight = self.proj.weight
        if ids is None:
            ids = torch.arange(self.num_patches, device=imgs.device).expand(imgs.shape[0], -1)
        device = imgs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        patches = ops.gather_patches(imgs, ids, self.patch_size, mean, std, dtype)
        return F.linear(patches, weight.flatten(1), self.proj.bias)

    def check(self, imgs: Tensor) -> None:
        """Raises ValueError unless imgs is (N, C, H, W) of the channels and size of this embedding."""
        expected = (self.proj.in_channels, *self.img_size)
        if imgs.dim() != 4 or imgs.shape[1:] != expected:
            raise ValueError(f"imgs must be (N, {expected[0]}, {expected[1]}, {expected[2]}); its shape is {tuple(imgs.shape)}")


class Attention(nn.Module):
    """Multi-head self-attention over the whole sequence; x (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width must be a multiple of num_heads; {dim} is no multiple of {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # [N, h, T, d]
        return self.proj(out.transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), exact erf GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block; x (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_layer: Callable[[int], nn.Module]):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
