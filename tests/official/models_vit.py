"""A plain classifier on the reference's modules: the truth of maefast.models_vit."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import reference

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class Block(reference.Block):
    def __init__(self, dim: int, num_heads: int, drop: float, drop_path: float):
        super().__init__(dim, num_heads, 4.0, LAYER_NORM, "sdpa")
        self.drop, self.drop_path = nn.Dropout(drop), drop_path

    def branch(self, y: Tensor) -> Tensor:
        """Stochastic depth: a sample's branch is left out, or scaled so that the mean stays."""
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
        img_size,
        num_classes,
        embed_dim,
        depth,
        num_heads,
        patch_size=16,
        in_chans=3,
        global_pool=False,
        drop_rate=0,
        drop_path_rate=0,
    ):
        super().__init__()
        self.global_pool = global_pool
        self.patch_embed = reference.PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, drop_rate, rate) for rate in rates)
        self.add_module("fc_norm" if global_pool else "norm", LAYER_NORM(embed_dim))
        self.head = nn.Linear(embed_dim, num_classes)
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for parameter in (self.pos_embed, self.cls_token, *(module.weight for module in linear)):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in linear:
            nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def tokens(self, imgs: Tensor, pos_embed: Tensor | None = None) -> list[Tensor]:
        """Return each block's tokens; pos_embed takes the place of the model's own positions."""
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
