"""The patch embedding: patches to tokens."""

import torch
from torch import Tensor, nn

from . import ops
from .autocast import compute_dtype
from .init import pair
from .plain import is_plain


class PatchEmbed(nn.Module):
    """The patch embedding. Only the requested patches are read from the image and multiplied.

    `proj` is a Conv2d for the sake of its parameters' names, shapes and initialisation; it runs as
    one GEMM. Where it is hooked, sharded or replaced it is called, each patch an image of its own.
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
        any_size: bool = False,
        patches: Tensor | None = None,
    ) -> Tensor:
        """imgs (N, C, H, W), ids (N, K) or None for all patches in row-major order -> (N, K or L,
        D), no positions added.

        uint8 images are read as (x/255 - mean)/std. any_size: H and W are any multiples of the
        patch. patches (N, K, P): those of ids, where they have been read already.
        """
        self.check(imgs, any_size)
        weight = self.proj.weight
        dtype = compute_dtype(weight)
        if patches is None:
            if ids is None:
                rows, cols = self.grid_of(imgs)
                ids = torch.arange(rows * cols, device=imgs.device).expand(imgs.shape[0], -1)
            patches = ops.gather_patches(imgs, ids, self.patch_size, mean, std, dtype)
        # those that were read outside of here, where a sharded weight may have another
        patches = patches.to(dtype)
        if is_plain(self.proj, nn.Conv2d):
            return ops.linear(patches, weight.flatten(1), self.proj.bias)
        windows = patches.flatten(0, 1).unflatten(1, (self.proj.in_channels, *self.patch_size))
        return self.proj(windows)[..., 0, 0].unflatten(0, patches.shape[:2])

    def masked(
        self, imgs: Tensor, noise: Tensor, len_keep: int, mean: Tensor | None, std: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens (N, K, D) of the patches that random masking keeps, then ids_keep,
        ids_restore, mask."""
        self.check(imgs)
        dtype = compute_dtype(self.proj.weight)
        patches, *masking = ops.mask_patches(imgs, noise, len_keep, self.patch_size, mean, std, dtype)
        return self(imgs, patches=patches), *masking

    def grid_of(self, imgs: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patches in imgs (N, C, H, W)."""
        return imgs.shape[2] // self.patch_size[0], imgs.shape[3] // self.patch_size[1]

    def check(self, imgs: Tensor, any_size: bool = False) -> None:
        """Check images. Raises ValueError unless imgs is (N, C, H, W) with this embedding's
        channels and size; any_size: whole patches."""
        (H, W), (ph, pw), C = self.img_size, self.patch_size, self.proj.in_channels
        fits = imgs.dim() == 4 and imgs.shape[1] == C
        if any_size:
            size = f"H, W), H a multiple of {ph} and W of {pw}"
            fits = fits and all(side and side % patch == 0 for side, patch in zip(imgs.shape[2:], self.patch_size, strict=True))
        else:
            size = f"{H}, {W})"
            fits = fits and imgs.shape[2:] == self.img_size
        if not fits:
            raise ValueError(f"imgs must be (N, {C}, {size}; its shape is {tuple(imgs.shape)}")
