"""Variants that the paper compares MAE with (He et al. 2022, table 1). Their tensors beyond MAE's
begin with variant_ in the state_dict."""

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..model import MAE
from .errors import UserError

COEFFICIENTS = 96  # of a patch of 16 x 16 x 3 = 768 values, in the paper
PATCHES = 1 << 16  # from which the principal components are computed
TARGETS = ("pixel", "norm", "pca")


class MaskTokensInEncoder(MAE):
    """An MAE whose encoder runs on all tokens, a learned one in place of each removed patch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.variant_mask_token = nn.Parameter(nn.init.normal_(torch.empty_like(self.cls_token), std=0.02))

    def _embed_kept(self, imgs: Tensor, noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Embed all patches in image order; ids_restore leaves the decoder no gaps to fill."""
        x, _, ids_restore, mask = self.patch_embed.masked(imgs, noise, len_keep, *self._statistics_for(imgs))
        x = F.pad(x, (0, 0, 1, 0))  # a row in the place of the class token, which _encode_tokens adds
        tokens = ops.unshuffle(x, ids_restore, self.variant_mask_token, self.pos_embed)[:, 1:]
        order = torch.arange(mask.shape[1], device=mask.device).repeat(len(mask), 1)
        return tokens, mask, order

    def _predict_removed(self, latent: Tensor, ids_restore: Tensor, mask: Tensor) -> Tensor:
        """Predict all patches, (N, L, P): the latent does not say how many were removed."""
        return self.forward_decoder(latent, ids_restore)


class PcaTarget(MAE):
    """An MAE that predicts coefficients of the largest principal components of patches.
    `find_components` finds these. `pred` is still pixels: those that the coefficients stand for."""

    variant_pca_mean: Tensor  # (P,)
    variant_pca_basis: Tensor  # (P, coefficients), orthonormal columns

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        values = self.decoder_pred.out_features
        unknown = torch.full((values, 1 + coefficients_of(values)), torch.nan)
        self.register_buffer("variant_pca_mean", unknown[:, 0].clone())
        self.register_buffer("variant_pca_basis", unknown[:, 1:].clone())

    @property
    def images_for_components(self) -> int:
        """Return how many images find_components needs, as each has L patches."""
        return math.ceil(PATCHES / self.patch_embed.num_patches)

    @torch.no_grad()
    def find_components(self, images: Iterable[Tensor]) -> None:
        """Take the principal components of the patches of images (C, H, W), floats or uint8."""
        device = self.variant_pca_basis.device
        patches = (self.target_patches(image[None].to(device))[0].cpu() for image in images)
        patches = (each[~each.isnan().any(dim=1)] for each in patches)  # the others have missing values
        mean, basis = principal_components(patches, self.variant_pca_basis.shape[1])
        self.variant_pca_mean.copy_(mean)
        self.variant_pca_basis.copy_(basis)

    def target_patches(self, imgs: Tensor) -> Tensor:
        """Return the patches (N, L, P) whose coefficients are predicted. imgs (N, C, H, W)."""
        return self.patchify(self._float_pixels(imgs))

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Return the patches (N, L, P) fp32 that the predicted coefficients stand for."""
        pred = super().forward_decoder(x, ids_restore)
        with torch.autocast(pred.device.type, enabled=False):
            mean, basis = self.variant_pca_mean.float(), self.variant_pca_basis.float()
            return mean + pred.float() @ basis @ basis.T

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error of the coefficients over the removed patches."""
        target = self.target_patches(imgs)
        with torch.autocast(pred.device.type, enabled=False):
            error = ((pred - target) @ self.variant_pca_basis.float()).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()


class MaskTokensAndPca(MaskTokensInEncoder, PcaTarget):
    """MaskTokensInEncoder and PcaTarget together."""


def variant(mask_tokens_in_encoder: bool, target: str) -> type[MAE]:
    """Return the class for these options of pre-training."""
    if target == "pca":
        return MaskTokensAndPca if mask_tokens_in_encoder else PcaTarget
    return MaskTokensInEncoder if mask_tokens_in_encoder else MAE


def variant_with(names: Collection[str]) -> type[MAE]:
    """Return the class whose state_dict has these names beyond MAE's."""
    return variant("variant_mask_token" in names, "pca" if "variant_pca_basis" in names else "pixel")


def coefficients_of(values: int) -> int:
    """Return the number of predicted components: 96, or half the values of a small patch."""
    return min(COEFFICIENTS, max(1, values // 2))


def principal_components(patches: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return mean (P,) and basis (P, count) fp32 of the largest principal components of patches
    (n, P). Raises UserError if there is none."""
    number, total, products = 0, torch.zeros(()), torch.zeros(())
    for chunk in patches:
        x = chunk.double()
        number, total, products = number + len(x), total + x.sum(dim=0), products + x.T @ x
    if not number:
        raise UserError("--target pca must have images to find the principal components of; none could be read")
    mean = total / number
    _, vectors = torch.linalg.eigh(products / number - mean[:, None] * mean)
    return mean.float(), vectors[:, -count:].flip(1).float()  # eigenvalues are in ascending order
