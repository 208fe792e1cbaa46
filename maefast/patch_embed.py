"""The patch embedding: patches to tokens."""

import torch
from torch import Tensor, nn

from . import ops
from .autocast import compute_dtype
from .init import pair
from .plain import is_plain


class PatchEmbed(nn.Module):
    """The patch embedding, which reads and multiplies only the requested patches.

    `proj` is a Conv2d for its parameters' names, shapes and initialisation; it runs as one GEMM, or
    is called on each patch if it is hooked, sharded or replaced.
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
        """Return tokens (N, K, D), without positions, of the patches ids (N, K) of imgs (N, C, H,
        W), by default of all L. any_size: H and W are any multiples of the patch. patches (N, K,
        P): those of ids, if they were read already."""
        self.check(imgs, any_size)
        weight = self.proj.weight
        dtype = compute_dtype(weight)
        if patches is None:
            if ids is None:
                rows, cols = self.grid_of(imgs)
                ids = torch.arange(rows * cols, device=imgs.device).expand(imgs.shape[0], -1)
            patches = ops.gather_patches(imgs, ids, self.patch_size, mean, std, dtype)
        patches = patches.to(dtype)  # given ones may have another, beside a sharded weight
        if is_plain(self.proj, nn.Conv2d):
            return ops.linear(patches, weight.flatten(1), self.proj.bias)
        windows = patches.flatten(0, 1).unflatten(1, (self.proj.in_channels, *self.patch_size))
        return self.proj(windows)[..., 0, 0].unflatten(0, patches.shape[:2])

    def masked(
        self, imgs: Tensor, noise: Tensor, len_keep: int, mean: Tensor | None, std: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the kept tokens (N, K, D), ids_keep, ids_restore and mask."""
        self.check(imgs)
        dtype = compute_dtype(self.proj.weight)
        patches, *masking = ops.mask_patches(imgs, noise, len_keep, self.patch_size, mean, std, dtype)
        return self(imgs, patches=patches), *masking

    def grid_of(self, imgs: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patches in imgs (N, C, H, W)."""
        return imgs.shape[2] // self.patch_size[0], imgs.shape[3] // self.patch_size[1]

    def check(self, imgs: Tensor, any_size: bool = False) -> None:
        """Raise ValueError unless imgs has this embedding's channels and size, or whole patches."""
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
