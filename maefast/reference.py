"""ReferenceMAE: the plain eager Masked Autoencoder, written for reading.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. The rest of the package is
judged by it: names of parameters, initialisation, masks for a seed, loss, gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VAR_EPS = 1e-6  # inside the root of the normalised-pixel target


class MAEOutput(NamedTuple):
    """What a Masked Autoencoder's forward returns; unpacks like the official triple."""

    loss: Tensor  # () fp32
    pred: Tensor | None  # (N, L, P), channel-fastest patch order (ph, pw, C)
    mask: Tensor  # (N, L) fp32, 1 = removed


def pair(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """Return `size` as (height, width); an int stands for both."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be positive; it is {size}")
    return int(height), int(width)


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return sin-cos positions (1, 1+L, dim), fp32, of a grid; the class token's are zero.

    Half of the width encodes the column and half the row, each as [sin | cos] of pos * 10000^(-k /
    (dim/4)), k = 0 .. dim/4-1 (2-D form of Vaswani et al. 2017, section 3.5), in float64.
    """
    if dim % 4:
        raise ValueError(f"the width of sin-cos positions must be divisible by 4, it is {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    col_angle, row_angle = (axis.reshape(-1, 1) * omega for axis in (cols, rows))  # [L, dim/4]
    table = torch.cat([col_angle.sin(), col_angle.cos(), row_angle.sin(), row_angle.cos()], dim=1)
    return torch.cat([table.new_zeros(1, dim), table]).float().unsqueeze(0)


@torch.no_grad()
def init_weights(model: Any) -> None:
    """Initialise a model just built, in the official order of random numbers: one seed gives the
    official weights. The bias of the patch embedding keeps torch's default draw."""
    model.pos_embed.copy_(sincos_positions(model.pos_embed.shape[-1], model.patch_embed.grid_size))
    model.decoder_pos_embed.copy_(sincos_positions(model.decoder_pos_embed.shape[-1], model.patch_embed.grid_size))
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))
    nn.init.normal_(model.cls_token, std=0.02)
    nn.init.normal_(model.mask_token, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        self.img_size, self.patch_size = pair(img_size, "img_size"), pair(patch_size, "patch_size")
        self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size)

    def forward(self, imgs: Tensor) -> Tensor:  # (N, C, H, W) -> (N, L, D)
        return self.proj(imgs).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, attention: str):
        super().__init__()
        self.num_heads, self.attention = num_heads, attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [N, h, T, d]
        if self.attention == "math":
            scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
            out = scores.softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, norm_layer, attention):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, attention)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ReferenceMAE(nn.Module):
    """The model of the paper with the official constructor. `attention` is "math", which stores the
    scores as the original does, or "sdpa", torch's own."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        norm_pix_loss: bool = False,
        *,
        attention: str = "sdpa",
    ):
        super().__init__()
        if attention not in ("math", "sdpa"):
            raise ValueError(f'attention must be "math" or "sdpa", it is {attention!r}')
        self.norm_pix_loss = norm_pix_loss
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), requires_grad=False)
        block = partial(Block, mlp_ratio=mlp_ratio, norm_layer=norm_layer, attention=attention)
        self.blocks = nn.ModuleList(block(embed_dim, num_heads) for _ in range(depth))
        self.norm = norm_layer(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = norm_layer(decoder_embed_dim)
        values = self.patch_embed.patch_size[0] * self.patch_embed.patch_size[1] * in_chans
        self.decoder_pred = nn.Linear(decoder_embed_dim, values)
        init_weights(self)

    def patchify(self, imgs: Tensor) -> Tensor:  # (N, C, H, W) -> (N, L, ph*pw*C), channel-fastest
        (ph, pw), (N, C, H, W) = self.patch_embed.patch_size, imgs.shape
        patches = imgs.reshape(N, C, H // ph, ph, W // pw, pw).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(N, (H // ph) * (W // pw), ph * pw * C)

    def random_masking(self, x: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return kept tokens (N, K, D) of x (N, L, D), of smallest noise, mask and ids_restore."""
        N, L, D = x.shape
        len_keep = int(L * (1 - mask_ratio))
        if noise is None:
            noise = torch.rand(N, L, device=x.device)
        ids_shuffle = noise.argsort(dim=1, stable=True)
        ids_restore = ids_shuffle.argsort(dim=1, stable=True)
        kept = x.gather(1, ids_shuffle[:, :len_keep, None].expand(-1, -1, D))
        mask = torch.ones(N, L, device=x.device)
        mask[:, :len_keep] = 0
        return kept, mask.gather(1, ids_restore), ids_restore

    def forward_encoder(self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, mask_ratio, noise)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(latent)
        N, L, D = *ids_restore.shape, x.shape[-1]
        mask_tokens = self.mask_token.expand(N, L + 1 - x.shape[1], -1)
        tokens = torch.cat([x[:, 1:], mask_tokens], dim=1)  # no class token, shuffled order
        tokens = tokens.gather(1, ids_restore[..., None].expand(-1, -1, D))  # image order
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error per patch, averaged over the removed patches (mask 1)."""
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + VAR_EPS) ** 0.5
        loss = ((pred - target) ** 2).mean(dim=-1)  # [N, L]
        return (loss * mask).sum() / mask.sum()

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75, *, noise: Tensor | None = None) -> MAEOutput:
        """Run imgs (N, C, H, W), float; noise (N, L) decides the mask, by default torch.rand's."""
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return MAEOutput(self.forward_loss(imgs, pred, mask), pred, mask)
