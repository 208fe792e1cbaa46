"""VisionTransformer: the pre-trained encoder for fine-tuning, linear probes and dense features."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .blocks import Block, run_blocks
from .patch_embed import PatchEmbed
from .plain import project
from .positions import resize_positions

INIT_STD = 0.02  # of Linear weights, class token and positions, as in timm


class VisionTransformer(Backbone):
    """A Vision Transformer classifier (Dosovitskiy et al. 2021) with official parameter names.

    num_classes     outputs of `head`, which may be replaced; 0 for none
    drop_rate       dropout after the positions, attention's projection, GELU and fc2
    drop_path_rate  stochastic depth (Huang et al. 2016) of the last block; 0 at the first, linear
    norm_layer      LayerNorm with eps 1e-6 by default
    global_pool     True: the mean of the patch tokens, then `fc_norm`. False: the class token of
                    `norm`
    img_size, patch_size    int or (H, W)
    mean, std       per channel, for uint8 images, read as (x/255 - mean)/std; ImageNet's by default
                    for three channels

    A MAE's state_dict loads with strict=False: head.* is missing and the decoder unexpected; with
    global_pool fc_norm.* is missing, too, and norm.* unexpected. Positions are trainable. Linear
    weights, class token and positions are drawn from N(0, 0.02) cut off at -2 and 2, biases are 0,
    the patch embedding keeps torch's initialisation.
    Raises ValueError for sizes that do not fit together and rates outside [0, 1).
    """

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
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None,
        global_pool: bool = False,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1); it is {rate}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more; it is {num_classes}")
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.num_classes, self.embed_dim, self.global_pool = num_classes, embed_dim, global_pool
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        block = partial(Block, embed_dim, num_heads, mlp_ratio, norm_layer, qkv_bias=qkv_bias, drop=drop_rate)
        self.blocks = nn.ModuleList(block(drop_path=drop_path_rate * i / max(1, depth - 1)) for i in range(depth))
        setattr(self, "fc_norm" if global_pool else "norm", norm_layer(embed_dim))
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()
        self._set_pixel_statistics(in_chans, mean, std)

    norm: nn.Module  # without global_pool
    fc_norm: nn.Module  # with it

    def _init_weights(self) -> None:
        for parameter in (self.pos_embed, self.cls_token):
            nn.init.trunc_normal_(parameter, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters with more than one dimension that are not decayed."""
        return {"pos_embed", "cls_token"}

    def forward(self, imgs: Tensor) -> Tensor:
        """Return logits (N, num_classes) of imgs (N, C, H, W), floating-point or uint8."""
        return project(self.head, self.forward_features(imgs))

    def forward_features(self, imgs: Tensor) -> Tensor:
        """Return what `head` reads, (N, D), of imgs (N, C, H, W), floating-point or uint8.

        Raises TypeError or ValueError for images that do not fit the model.
        """
        self._check_images(imgs)
        x = run_blocks(self.blocks, None, self._tokens(imgs, self.pos_embed[:, 1:]))
        return self.fc_norm(x[:, 1:].mean(dim=1)) if self.global_pool else self.norm(x[:, 0])

    def encode(self, imgs: Tensor) -> Tensor:
        """Return the tokens (N, 1+L, D) of imgs (N, C, H, W) after `norm`, as MAE.encode.

        Raises TypeError or ValueError for images that do not fit the model, and with
        global_pool, which has no `norm`.
        """
        if self.global_pool:
            raise ValueError("encode needs the model's norm, and global_pool must be False for that; it is True")
        self._check_images(imgs)
        return run_blocks(self.blocks, self.norm, self._tokens(imgs, self.pos_embed[:, 1:]))

    def features(self, imgs: Tensor, blocks: Sequence[int] = (-1,)) -> list[Tensor]:
        """Return feature maps for detection and segmentation, from images of any size.

        imgs     (N, C, H, W)        floating-point or uint8, multiples of the patch (ph, pw)
        blocks                       indices of blocks; negative ones count from the end
        returns  (N, D, H/ph, W/pw)  for each of `blocks`, its patch tokens, not normalised
        Positions are resized to another grid in 2-D, bicubic, with gradients. Blocks after the last
        requested one do not run.
        Raises TypeError or ValueError for images or blocks that do not fit the model.
        """
        self._check_images(imgs, any_size=True)
        depth = len(self.blocks)
        for index in blocks:
            if not -depth <= index < depth:
                raise ValueError(f"blocks must be in [-{depth}, {depth}); one is {index}")
        wanted = [index % depth for index in blocks]
        grid = self.patch_embed.grid_of(imgs)
        x = self._tokens(imgs, resize_positions(self.pos_embed[:, 1:], self.patch_embed.grid_size, grid))
        maps, done = dict[int, Tensor](), 0
        for index in sorted(set(wanted)):
            x, done = run_blocks(self.blocks[done : index + 1], None, x), index + 1
            maps[index] = x[:, 1:].transpose(1, 2).unflatten(2, grid)
        return [maps[index] for index in wanted]

    def _tokens(self, imgs: Tensor, positions: Tensor) -> Tensor:
        return self.pos_drop(self._with_class_token(self._embed(imgs, any_size=True) + positions))
