"""A plain encoder classifier on the reference's modules, under the official module's names: the truth of maefast.models_vit."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import reference


class Block(reference.Block):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_layer: Any, drop: float, drop_path: float):
        super().__init__(dim, num_heads, mlp_ratio, norm_layer, "sdpa")
        self.drop, self.drop_path = nn.Dropout(drop), drop_path

    def branch(self, y: Tensor) -> Tensor:
        """Stochastic depth: the branch of a sample is left out, or made larger so that the mean stays the same."""
        if not self.training or self.drop_path == 0:
            return y
        keep = 1 - self.drop_path
        return y * torch.empty(len(y), 1, 1).bernoulli_(keep).to(y.dtype) / keep

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(self.drop(self.attn(self.norm1(x))))
        hidden = self.drop(F.gelu(self.mlp.fc1(self.norm2(x))))
        return x + self.branch(self.drop(self.mlp.fc2(hidden)))


class VisionTransformer(nn.Module):
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: bool = False,
    ):
        super().__init__()
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.global_pool = global_pool
        self.patch_embed = reference.PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, norm_layer, drop_rate, rate) for rate in rates)
        if global_pool:
            self.fc_norm = norm_layer(embed_dim)
        else:
            self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def tokens(self, imgs: Tensor, pos_embed: Tensor | None = None) -> list[Tensor]:
        """What each block makes of the class token and the patches; pos_embed: positions in place of its own."""
        x = self.patch_embed(imgs)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.pos_drop(x + (self.pos_embed if pos_embed is None else pos_embed))
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def forward_features(self, imgs: Tensor) -> Tensor:
        x = self.tokens(imgs)[-1]
        return self.fc_norm(x[:, 1:].mean(dim=1)) if self.global_pool else self.norm(x)[:, 0]

    def forward(self, imgs: Tensor) -> Tensor:
        return self.head(self.forward_features(imgs))


vit_tiny_patch16 = partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3)
