"""Mask patches: random masking and the patches that it keeps, on a GPU in one launch."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import FLOATS, IMAGES, Kernel, Op
from ._checks import check_images, check_out_dtype, check_patch_size, check_same_device, needs_gradient, shape_of, why_no_gradient
from .gather_patches import gather_patches, gather_patches_ref
from .random_masking import CUDA_RANKS, MaskingAsk, check_noise, random_masking, random_masking_ref
from .random_masking import OP as RANDOM_MASKING


class MaskPatchesAsk(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    imgs: torch.dtype
    noise: torch.dtype
    out: torch.dtype
    differentiated: bool  # whether imgs needs a gradient
    patches: int


def _why_not(ask: MaskPatchesAsk) -> str | None:
    if ask.patches > CUDA_RANKS:
        return f"native mask_patches on a GPU ranks up to {CUDA_RANKS} patches, noise has {ask.patches}"
    return why_no_gradient("mask_patches", "imgs") if ask.differentiated else None


def _why_slow(ask: MaskPatchesAsk) -> str | None:
    if dispatch.choose(RANDOM_MASKING, MaskingAsk(ask.device, ask.noise, ask.patches)) == "native":
        return None
    return "no measurement shows that one native launch is faster than two of triton's"


KERNELS = (
    Kernel("native", ("cuda",), {"imgs": IMAGES, "noise": (torch.float32,), "out": FLOATS}, why_not=_why_not, why_slow=_why_slow),
)
AUTO = {"cuda": ("native",)}
OP = Op(
    "mask_patches",
    KERNELS,
    AUTO,
    lambda device, dtype: MaskPatchesAsk(device, dtype, torch.float32, dtype, differentiated=False, patches=196),
)


def mask_patches(
    imgs: Tensor,
    noise: Tensor,
    len_keep: int,
    patch_size: int | tuple[int, int],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run random_masking, then gather_patches on what it keeps (He et al. 2022, section 3).

    imgs         (N, C, H, W)  floating-point, or uint8, which is read as (x/255 - mean)/std
    noise        (N, L)        fp32, L = (H/ph)(W/pw)
    mean, std    (C,)          fp32, for uint8 images; both or none
    dtype                      of the patches; by default that of imgs, fp32 for uint8
    returns
    patches      (N, K, P)     in the order of their noise, P = C*ph*pw in the order (C, ph, pw)
    ids_keep     (N, K)        int64
    ids_restore  (N, L)        int64
    mask         (N, L)        fp32, 1 = removed
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit, or len_keep is not in
    [0, L].
    """
    ph, pw = check_patch_size(patch_size)
    check_images(imgs, (ph, pw), mean, std)
    check_noise(noise, len_keep)
    check_same_device(imgs=imgs, noise=noise)
    if noise.shape != (shape := (imgs.shape[0], (imgs.shape[2] // ph) * (imgs.shape[3] // pw))):
        raise ValueError(f"noise must be (N, L) = {shape}; its shape is {shape_of(noise)}")
    dtype = check_out_dtype(dtype, torch.float32 if imgs.dtype == torch.uint8 else imgs.dtype)
    ask = MaskPatchesAsk(imgs.device, imgs.dtype, noise.dtype, dtype, needs_gradient(imgs), noise.shape[1])
    if dispatch.choose(OP, ask) == "native":
        return torch.ops.maefast.mask_patches_fwd(imgs, noise, len_keep, ph, pw, mean, std, dtype)
    ids_keep, ids_restore, mask = random_masking(noise, len_keep)
    return gather_patches(imgs, ids_keep, (ph, pw), mean, std, dtype), ids_keep, ids_restore, mask


def mask_patches_ref(
    imgs: Tensor,
    noise: Tensor,
    len_keep: int,
    patch_size: tuple[int, int],
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids_keep, ids_restore, mask = random_masking_ref(noise, len_keep)
    return gather_patches_ref(imgs, ids_keep, patch_size, mean, std, dtype), ids_keep, ids_restore, mask


@torch.library.register_fake("maefast::mask_patches_fwd")
def _mask_patches_fwd_fake(
    imgs: Tensor,
    noise: Tensor,
    len_keep: int,
    patch_h: int,
    patch_w: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, L = noise.shape
    patches = imgs.new_empty(N, len_keep, imgs.shape[1] * patch_h * patch_w, dtype=dtype)
    ids_keep, ids_restore = (noise.new_empty(N, size, dtype=torch.int64) for size in (len_keep, L))
    return patches, ids_keep, ids_restore, noise.new_empty(N, L)
