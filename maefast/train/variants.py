"""Variants of the model that the paper compares MAE with (He et al. 2022, table 1): maefast
pretrain --mask_tokens_in_encoder and --target pca. The tensors that a variant has beyond MAE begin
with variant_ in its state_dict; the others are an MAE's."""

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
    """The encoder runs on all tokens, with a learned one in the place of each removed patch; the
    decoder takes them all."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.variant_mask_token = nn.Parameter(nn.init.normal_(torch.empty_like(self.cls_token), std=0.02))

    def _embed_kept(self, imgs: Tensor, noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Embed all patches in image order, as MAE does the kept ones; their ids_restore leaves no
        gaps for the decoder to fill."""
        x, _, ids_restore, mask = self.patch_embed.masked(imgs, noise, len_keep, *self._statistics_for(imgs))
        # a row in the place of the class token, which _encode_tokens adds
        x = F.pad(x, (0, 0, 1, 0))
        tokens = ops.unshuffle(x, ids_restore, self.variant_mask_token, self.pos_embed)[:, 1:]
        order = torch.arange(mask.shape[1], device=mask.device).repeat(len(mask), 1)
        return tokens, mask, order

    def _predict_removed(self, latent: Tensor, ids_restore: Tensor, mask: Tensor) -> Tensor:
        """Return predictions (N, L, P) of all patches, since the latent does not say how many were
        removed."""
        return self.forward_decoder(latent, ids_restore)


class PcaTarget(MAE):
    """The target of a patch is its coefficients in the largest principal components of patches,
    which `find_components` finds.

    `pred` is still pixels of patches: those that the predicted coefficients stand for.
    """

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
        """Take the principal components of the patches of `images`, (C, H, W) floating-point or
        uint8."""
        device = self.variant_pca_basis.device
        patches = (self.target_patches(image[None].to(device))[0].cpu() for image in images)
        patches = (each[~each.isnan().any(dim=1)] for each in patches)  # the others have missing values
        mean, basis = principal_components(patches, self.variant_pca_basis.shape[1])
        self.variant_pca_mean.copy_(mean)
        self.variant_pca_basis.copy_(basis)

    def target_patches(self, imgs: Tensor) -> Tensor:
        """imgs (N, C, H, W), floating-point or uint8 -> the patches (N, L, P) whose coefficients
        are predicted."""
        return self.patchify(self._float_pixels(imgs))

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """latent, ids_restore (N, L) -> pred (N, L, P), fp32: the patches that the predicted
        coefficients stand for."""
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
    with_pca: type[MAE] = MaskTokensAndPca if mask_tokens_in_encoder else PcaTarget
    without: type[MAE] = MaskTokensInEncoder if mask_tokens_in_encoder else MAE
    return with_pca if target == "pca" else without


def variant_with(names: Collection[str]) -> type[MAE]:
    """Return the class whose state_dict has these names beyond MAE's."""
    return variant("variant_mask_token" in names, "pca" if "variant_pca_basis" in names else "pixel")


def coefficients_of(values: int) -> int:
    """How many principal components of a patch of so many values are predicted: 96; of small ones
    half, as all of them would be the pixels themselves."""
    return min(COEFFICIENTS, max(1, values // 2))


def principal_components(patches: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """mean (P,) and basis (P, count) of the largest principal components, in fp32, of patches that
    come as tensors (n, P). Raises UserError where there is none."""
    number, total, products = 0, torch.zeros(()), torch.zeros(())
    for chunk in patches:
        x = chunk.double()
        number, total, products = number + len(x), total + x.sum(dim=0), products + x.T @ x
    if not number:
        raise UserError("--target pca must have images to find the principal components of; none could be read")
    mean = total / number
    # eigenvalues in ascending order
    _, vectors = torch.linalg.eigh(products / number - mean[:, None] * mean)
    return mean.float(), vectors[:, -count:].flip(1).float()
