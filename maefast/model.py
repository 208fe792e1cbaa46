"""MAE: the Masked Autoencoder (He et al. 2022) behind the official API, on the fused ops."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, ops
from .backbone import Backbone
from .blocks import Block, run_blocks
from .init import MAEOutput, init_weights
from .masking import check_masking, noise_of_mask
from .ops._tokens import take_tokens
from .ops.masked_mse import VAR_EPS
from .patch_embed import PatchEmbed
from .plain import project

# The official model's methods that forward calls; an override takes forward off the fused path.
ENCODER_METHODS = ("forward_encoder", "random_masking")
DECODER_METHODS = ("forward_decoder", "forward_loss", "patchify")


class MAE(Backbone):
    """A Masked Autoencoder with the official constructor, parameter names and initialisation.

    img_size, patch_size    int or (H, W)
    mean, std       per channel, for uint8 images, read as (x/255 - mean)/std; ImageNet's by default
                    for three channels
    attn_backend    the `backend` of ops.attention
    """

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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attn_backend: str = "auto",
    ):
        super().__init__()
        self.norm_pix_loss = norm_pix_loss
        self.attn_backend = attn_backend
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), requires_grad=False)
        block = partial(Block, mlp_ratio=mlp_ratio, norm_layer=norm_layer, attn_backend=attn_backend)
        self.blocks = nn.ModuleList(block(embed_dim, num_heads) for _ in range(depth))
        self.norm = norm_layer(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = norm_layer(decoder_embed_dim)
        ph, pw = self.patch_embed.patch_size
        self.decoder_pred = nn.Linear(decoder_embed_dim, ph * pw * in_chans)
        init_weights(self)

        self._set_pixel_statistics(in_chans, mean, std)

    # -- checkpoints

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, key: str | None = None, stored_grid: tuple[int, int] | None = None, **overrides: Any
    ) -> "MAE":
        """Return a model with the architecture and weights of a checkpoint of any known layout.

        overrides           arguments of the constructor that the checkpoint lacks or that override
                            it; img_size resizes the positions
        key, stored_grid    as in maefast.checkpoint.load

        Possible mistakes, such as an absent decoder, are a UserWarning. Raises as
        maefast.checkpoint.load, and CheckpointError (a ValueError) if num_heads is neither stored,
        nor implied by the width, nor given.
        """
        model, report = checkpoint.from_pretrained(cls, path, key=key, stored_grid=stored_grid, **overrides)
        for warning in report.warnings:
            warnings.warn(f"{path}: {warning}", stacklevel=2)
        return model

    def init_from(
        self, path: str | Path, *, key: str | None = None, stored_grid: tuple[int, int] | None = None
    ) -> checkpoint.LoadReport:
        """Start from the weights of a checkpoint: maefast.checkpoint.init_from."""
        return checkpoint.init_from(self, path, key=key, stored_grid=stored_grid)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that from_pretrained reads: maefast.checkpoint.save_pretrained."""
        checkpoint.save_pretrained(self, folder)

    # -- the official methods

    def patchify(self, imgs: Tensor) -> Tensor:
        """Return the patches (N, L, ph*pw*C), row-major, of imgs (N, C, H, W), channel-fastest."""
        self.patch_embed.check(imgs)
        (ph, pw), (N, C, H, W) = self.patch_embed.patch_size, imgs.shape
        patches = imgs.reshape(N, C, H // ph, ph, W // pw, pw).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(N, (H // ph) * (W // pw), ph * pw * C)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Return images (N, C, H, W) from patches x (N, L, ph*pw*C), the inverse of patchify."""
        (ph, pw), (grid_h, grid_w) = self.patch_embed.patch_size, self.patch_embed.grid_size
        C = self.patch_embed.proj.in_channels
        if x.dim() != 3 or x.shape[1:] != (grid_h * grid_w, ph * pw * C):
            raise ValueError(f"x must be (N, {grid_h * grid_w}, {ph * pw * C}); its shape is {tuple(x.shape)}")
        x = x.reshape(x.shape[0], grid_h, grid_w, ph, pw, C).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(x.shape[0], C, grid_h * ph, grid_w * pw)

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return kept tokens (N, K, D) of x (N, L, D), mask (N, L) and ids_restore (N, L)."""
        N, L, _ = x.shape
        len_keep = ops.len_keep(L, mask_ratio)
        ids_keep, ids_restore, mask = ops.random_masking(ops.masking_noise(N, L, x.device), len_keep)
        return take_tokens(x, ids_keep), mask, ids_restore

    def forward_encoder(self, imgs: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return latent (N, 1+K, D), mask (N, L) and ids_restore (N, L) of imgs (N, C, H, W)."""
        self._check_images(imgs)
        if self._overridden("random_masking"):
            x, mask, ids_restore = self.random_masking(self._embed(imgs) + self.pos_embed[:, 1:], mask_ratio)
        else:
            N, L = imgs.shape[0], self.patch_embed.num_patches
            len_keep = ops.len_keep(L, mask_ratio)
            x, mask, ids_restore = self._embed_kept(imgs, ops.masking_noise(N, L, imgs.device), len_keep)
        return self._encode_tokens(x), mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Return pred (N, L, P), channel-fastest, of latent (N, 1+K, D) and ids_restore (N, L)."""
        return project(self.decoder_pred, self._decode(x, ids_restore))[:, 1:]

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the scalar loss, the mean over removed patches.

        imgs (N, C, H, W), pred (N, L, P), mask (N, L), 1 = removed
        """
        if self._overridden("patchify"):
            target = self.patchify(imgs if imgs.dtype.is_floating_point else self._float_pixels(imgs))
            if self.norm_pix_loss:
                mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
                target = (target - mean) / (var + VAR_EPS) ** 0.5
            loss = ((pred - target) ** 2).mean(dim=-1)
            return (loss * mask).sum() / mask.sum()
        return ops.masked_mse(
            pred, imgs, mask.float(), self.patch_embed.patch_size, self.norm_pix_loss, *self._statistics_for(imgs)
        )

    # -- forward

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        *,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        return_pred: bool = True,
    ) -> MAEOutput:
        """Run one pre-training forward (He et al. 2022, section 3).

        imgs         (N, C, H, W)  floating-point, or uint8 where mean and std are known
        mask_ratio                 share of removed patches; int(L * (1 - mask_ratio)) are kept
        noise        (N, L)        fp32, decides the mask in place of a fresh uniform draw
        mask         (N, L)        bool or floating-point, 1 = removed, as many in each row, in
                                   place of mask_ratio; on a GPU it costs a synchronisation
        weights      (N, L)        floating-point, 0 or more: the weight of a removed patch in the
                                   loss; 0 for one with missing values, whatever they are
        return_pred                False: pred is None, and the decoder predicts removed patches
                                   only; same loss, same gradients
        returns      (loss, pred, mask): scalar fp32, (N, L, P), (N, L) fp32 with 1 = removed
        Raises TypeError or ValueError for input that does not fit the model, and RuntimeError if an
        overridden method cannot honour an argument; nothing has then changed.
        """
        self._check_images(imgs)
        L = self.patch_embed.num_patches
        if imgs.shape[0] == 0:
            raise ValueError("imgs must hold at least one image; the batch is empty")
        check_masking(imgs, L, mask_ratio, noise, mask, weights)
        if not return_pred:
            self._refuse("return_pred=False", DECODER_METHODS)
        for name, tensor in (("noise=", noise), ("mask=", mask)):
            if tensor is not None:
                self._refuse(name, ENCODER_METHODS)
        if any(map(self._overridden, ENCODER_METHODS)):
            latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        else:
            noise, len_keep = (noise, ops.len_keep(L, mask_ratio)) if mask is None else noise_of_mask(mask)
            if noise is None:
                noise = ops.masking_noise(imgs.shape[0], L, imgs.device)
            x, mask, ids_restore = self._embed_kept(imgs, noise, len_keep)
            latent = self._encode_tokens(x)
        if return_pred or weights is not None or any(map(self._overridden, DECODER_METHODS)):
            pred = self.forward_decoder(latent, ids_restore)
            counted = mask if weights is None else mask * weights
            return MAEOutput(self.forward_loss(imgs, pred, counted), pred if return_pred else None, mask)
        pred = self._predict_removed(latent, ids_restore, mask)
        return MAEOutput(self.forward_loss(imgs, pred, mask), None, mask)

    def encode(self, imgs: Tensor) -> Tensor:
        """Return all tokens (N, 1+L, D) of imgs (N, C, H, W) after `norm`, class token first."""
        self._check_images(imgs)
        return self._encode_tokens(self._embed(imgs) + self.pos_embed[:, 1:])

    @torch.no_grad()
    def reconstruct(
        self, imgs: Tensor, mask_ratio: float = 0.75, *, noise: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return images (N, C, H, W), fp32, in the range of imgs (0..255 for uint8): visible
        patches as they are, removed ones predicted. A normalised prediction is scaled back by the
        mean and std of its own patch."""
        _, pred, mask = self(imgs, mask_ratio, noise=noise, mask=mask)
        target, pred = MAE.patchify(self, self._float_pixels(imgs)), pred.float()
        if self.norm_pix_loss:
            average, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            pred = pred * (var + VAR_EPS) ** 0.5 + average
        predicted = self.unpatchify(pred)
        mean, std = self._statistics_for(imgs)
        if mean is not None and std is not None:
            predicted = ((predicted * std[:, None, None] + mean[:, None, None]) * 255).clamp(0, 255)
        removed = self.unpatchify(mask[..., None].expand_as(target))
        return torch.where(removed == 1, predicted, imgs.float())

    # -- what forward is made of

    def _float_pixels(self, imgs: Tensor) -> Tensor:
        mean, std = self._statistics_for(imgs)
        if mean is None or std is None:
            return imgs.float()
        return (imgs.float() / 255 - mean[:, None, None]) / std[:, None, None]

    def _embed_kept(self, imgs: Tensor, noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the kept tokens (N, K, D) with positions, mask and ids_restore."""
        statistics = self._statistics_for(imgs)
        if type(self.patch_embed) is PatchEmbed:
            x, ids_keep, ids_restore, mask = self.patch_embed.masked(imgs, noise, len_keep, *statistics)
        else:
            ids_keep, ids_restore, mask = ops.random_masking(noise, len_keep)
            x = self.patch_embed(imgs, ids_keep, *statistics)
        return x + F.embedding(ids_keep + 1, self.pos_embed[0]), mask, ids_restore

    def _encode_tokens(self, x: Tensor) -> Tensor:  # (N, K, D), positions added -> (N, 1+K, D)
        return run_blocks(self.blocks, self.norm, self._with_class_token(x))

    def _decode(self, latent: Tensor, ids_restore: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the decoder's tokens (N, 1+L, D), or those of ids (N, M), after decoder_norm."""
        tokens = (project(self.decoder_embed, latent), ids_restore, self.mask_token, self.decoder_pos_embed)
        x = ops.unshuffle(*tokens)
        return run_blocks(self.decoder_blocks, self.decoder_norm, x, ids=ids, unshuffled=None if ids is None else tokens)

    def _predict_removed(self, latent: Tensor, ids_restore: Tensor, mask: Tensor) -> Tensor:
        """Return predictions (N, M, P) of the removed patches, in ascending patch index."""
        removed = mask.shape[1] + 1 - latent.shape[1]
        # ranks of 0 and 1: the removed ones first, in ascending order
        ids_removed = ops.random_masking(1 - mask, removed)[0]
        return project(self.decoder_pred, self._decode(latent, ids_restore, 1 + ids_removed))

    # -- overrides and checks

    def _overridden(self, name: str) -> bool:
        return name in self.__dict__ or getattr(type(self), name) is not getattr(MAE, name)

    def overridden_methods(self) -> tuple[str, ...]:
        """Return the official methods that a subclass or the instance replaces."""
        return tuple(name for name in ENCODER_METHODS + DECODER_METHODS if self._overridden(name))

    def _refuse(self, argument: str, methods: Sequence[str]) -> None:
        if overridden := [name for name in methods if self._overridden(name)]:
            override = f"{type(self).__name__} overrides {overridden[0]}, which has no such argument"
            raise RuntimeError(f"{argument} cannot be honoured: {override}")
