"""Gather patches: the kept patches of each image, ready for the patch embedding's GEMM."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch, kernels
from .._library import register_fake
from ..dispatch import FLOATS, IMAGES, Kernel, Op
from ._checks import (
    check_dtype,
    check_images,
    check_out_dtype,
    check_patch_size,
    check_same_device,
    needs_gradient,
    shape_of,
    to_float_pixels,
    values_are_known,
    why_no_gradient,
)


class PatchesAsk(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    imgs: torch.dtype
    out: torch.dtype
    differentiated: bool  # whether imgs needs a gradient


def _why_not(ask: PatchesAsk) -> str | None:
    return why_no_gradient("gather_patches", "imgs") if ask.differentiated else None


_DTYPES = {"imgs": IMAGES, "out": FLOATS}
KERNELS = (
    Kernel("native", ("cpu",), _DTYPES, why_not=_why_not),
    Kernel("native", ("cuda",), _DTYPES, why_not=_why_not),
    Kernel("triton", kernels.DEVICES, _DTYPES, why_not=_why_not),
)
AUTO = {"cpu": ("native",), "cuda": ("triton", "native")}
OP = Op("gather_patches", KERNELS, AUTO, lambda device, dtype: PatchesAsk(device, dtype, dtype, differentiated=False))


def gather_patches(
    imgs: Tensor,
    ids: Tensor,
    patch_size: int | tuple[int, int],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The patches `ids` of each image, flattened in conv-weight order (He et al. 2022, section 3).

    imgs       (N, C, H, W)  fp32/bf16/fp16/fp64, or uint8, which is read as (x/255 - mean)/std
    ids        (N, K)        int64 in [0, L), L = (H/ph)(W/pw), row-major
    mean, std  (C,)          fp32, for uint8 images; both or none
    dtype                    of the result; by default that of imgs, fp32 for uint8
    returns    (N, K, P)     P = C*ph*pw in the order (C, ph, pw)
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit, and, on the CPU, when
    an id is out of range.
    """
    ph, pw = check_patch_size(patch_size)
    check_images(imgs, (ph, pw), mean, std)
    check_dtype("ids", ids, (torch.int64,))
    if ids.dim() != 2 or ids.shape[0] != imgs.shape[0]:
        raise ValueError(f"ids must be (N, K) with N = {imgs.shape[0]}; its shape is {shape_of(ids)}")
    check_same_device(imgs=imgs, ids=ids)
    dtype = check_out_dtype(dtype, torch.float32 if imgs.dtype == torch.uint8 else imgs.dtype)
    backend = dispatch.choose(OP, PatchesAsk(imgs.device, imgs.dtype, dtype, needs_gradient(imgs)))
    if backend != "eager":
        return dispatch.ops_of(backend).gather_patches_fwd(imgs, ids, ph, pw, mean, std, dtype)
    return gather_patches_ref(imgs, ids, (ph, pw), mean, std, dtype)


def gather_patches_ref(
    imgs: Tensor, ids: Tensor, patch_size: tuple[int, int], mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (ph, pw), (N, C, H, W) = patch_size, imgs.shape
    grid_h, grid_w = H // ph, W // pw
    if values_are_known(ids) and ids.numel() and not (ids.min() >= 0 and ids.max() < grid_h * grid_w):
        raise ValueError(f"ids must be in [0, {grid_h * grid_w}); they are in [{ids.min()}, {ids.max()}]")
    patches = imgs.reshape(N, C, grid_h, ph, grid_w, pw).permute(0, 2, 4, 1, 3, 5)  # [N, grid_h, grid_w, C, ph, pw]
    kept = patches[torch.arange(N, device=imgs.device)[:, None], ids // grid_w, ids % grid_w]  # [N, K, C, ph, pw]
    pixels = to_float_pixels(kept.flatten(0, 1), mean, std).to(dtype)
    return pixels.reshape(N, ids.shape[1], C * ph * pw)


@register_fake("gather_patches_fwd")
def _gather_patches_fwd_fake(
    imgs: Tensor, ids: Tensor, patch_h: int, patch_w: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return imgs.new_empty(*ids.shape, imgs.shape[1] * patch_h * patch_w, dtype=dtype)
