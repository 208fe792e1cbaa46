"""Masked MSE: the error of predicted patches against the image, over the removed patches."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, kernels
from .._library import register_fake
from ..dispatch import FLOATS, IMAGES, Kernel, Op
from ._checks import (
    check_dtype,
    check_floating,
    check_images,
    check_no_grad,
    check_patch_size,
    check_same_device,
    needs_gradient,
    shape_of,
    to_float_pixels,
    values_are_known,
    why_no_gradient,
)

VAR_EPS = 1e-6  # inside the root
CUDA_VALUES = 12272  # of a patch that the CUDA kernel holds in shared memory
TRITON_VALUES = 4096  # of a patch, padded to powers of two, that Triton's kernel holds in registers


class MseAsk(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    pred: torch.dtype
    imgs: torch.dtype
    differentiated: bool  # whether imgs needs a gradient
    channels: int
    values: int  # P, of a patch


def _why_not(ask: MseAsk) -> str | None:
    return why_no_gradient("masked_mse", "imgs") if ask.differentiated else None


def _why_not_cuda(ask: MseAsk) -> str | None:
    if ask.values > CUDA_VALUES:
        return f"native masked_mse on a GPU holds patches of up to {CUDA_VALUES} values, pred has {ask.values}"
    return _why_not(ask)


def _why_not_triton(ask: MseAsk) -> str | None:
    padded_channels, padded_pixels = (1 << (n - 1).bit_length() for n in (ask.channels, ask.values // ask.channels))
    if padded_channels * padded_pixels > TRITON_VALUES:
        sizes = f"pred has {ask.values} in {ask.channels} channels"
        return f"triton masked_mse holds patches of up to {TRITON_VALUES} values, padded; {sizes}"
    return _why_not(ask)


_DTYPES = {"pred": FLOATS, "imgs": IMAGES}
KERNELS = (
    Kernel("native", ("cpu",), _DTYPES, why_not=_why_not),
    Kernel("native", ("cuda",), _DTYPES, why_not=_why_not_cuda),
    Kernel("triton", kernels.DEVICES, _DTYPES, why_not=_why_not_triton),
)
AUTO = {"cpu": ("native",), "cuda": ("triton", "native")}
OP = Op(
    "masked_mse", KERNELS, AUTO, lambda device, dtype: MseAsk(device, dtype, dtype, differentiated=False, channels=3, values=768)
)


def masked_mse(
    pred: Tensor,
    imgs: Tensor,
    mask: Tensor,
    patch_size: int | tuple[int, int],
    norm_pix: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """sum(mask * loss) / sum(mask), loss the mean squared error of a patch (He et al. 2022, section
    3, "Reconstruction target").

    pred       (N, L, P)     or (N, M, P), only the removed patches in ascending index; P is
                             in the order (ph, pw, C)
    imgs       (N, C, H, W)  floating-point, or uint8, which is read as (x/255 - mean)/std
    mask       (N, L)        fp32 weights, 1 = removed; for (N, M, P) M of a row are not zero
    norm_pix                 the target is (x - mean) / sqrt(var + 1e-6), var unbiased
    mean, std  (C,)          fp32, for uint8 images; both or none
    returns    ()            fp32 (fp64 for fp64 pred)
    A patch of weight zero may hold any values. Gradients for pred, and for imgs by plain torch.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit, and, on the CPU, for
    an empty mask.
    """
    ph, pw = check_patch_size(patch_size)
    check_images(imgs, (ph, pw), mean, std)
    check_floating(pred=pred)
    check_dtype("mask", mask, (torch.float32,))
    check_no_grad(mask=mask)
    check_same_device(pred=pred, imgs=imgs, mask=mask)
    N, C, H, W = imgs.shape
    L, P = (H // ph) * (W // pw), C * ph * pw
    if C == 0:
        raise ValueError(f"imgs must have at least one channel; its shape is {shape_of(imgs)}")
    if mask.shape != (N, L):
        raise ValueError(f"mask must be (N, L) = ({N}, {L}); its shape is {shape_of(mask)}")
    if pred.dim() != 3 or pred.shape[0] != N or not 1 <= pred.shape[1] <= L or pred.shape[2] != P:
        raise ValueError(f"pred must be ({N}, M, {P}) with 1 <= M <= L = {L}; its shape is {shape_of(pred)}")
    if norm_pix and P < 2:
        raise ValueError("norm_pix needs patches of at least two values; these have one")
    backend = dispatch.choose(OP, MseAsk(imgs.device, pred.dtype, imgs.dtype, needs_gradient(imgs), C, P))
    if backend != "eager":
        return _MaskedMse.apply(backend, pred, imgs, mask, ph, pw, norm_pix, mean, std)
    return masked_mse_ref(pred, imgs, mask, (ph, pw), norm_pix, mean, std)


def masked_mse_ref(
    pred: Tensor, imgs: Tensor, mask: Tensor, patch_size: tuple[int, int], norm_pix: bool, mean: Tensor | None, std: Tensor | None
) -> Tensor:
    (ph, pw), (N, C, H, W) = patch_size, imgs.shape
    L = (H // ph) * (W // pw)
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    pixels = to_float_pixels(imgs, mean, std).to(dtype)
    target = pixels.reshape(N, C, H // ph, ph, W // pw, pw).permute(0, 2, 4, 3, 5, 1).reshape(N, L, ph * pw * C)
    if norm_pix:
        centred = target - target.mean(dim=-1, keepdim=True)
        var = (centred**2).sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
        target = centred / (var + VAR_EPS) ** 0.5
    weight = mask.to(dtype)
    if values_are_known(mask) and N:
        _check_mask(mask, pred.shape[1])
    if pred.shape[1] < L:  # rows of removed patches: the same rows of target and weight
        removed = (mask != 0).float().argsort(dim=1, descending=True, stable=True)[:, : pred.shape[1]]
        target = target.gather(1, removed[..., None].expand(-1, -1, target.shape[2]))
        weight = weight.gather(1, removed)
    error = torch.where((weight == 0)[..., None], 0, pred.to(dtype) - target)  # a patch without weight may hold anything
    return ((error**2).mean(dim=-1) * weight).sum() / weight.sum()


def _check_mask(mask: Tensor, rows: int) -> None:
    removed = (mask != 0).sum(dim=1)
    if rows < mask.shape[1] and not (removed == rows).all():
        raise ValueError(f"pred has {rows} rows a sample; mask must remove as many in each row, it removes {removed.tolist()}")
    if mask.sum() == 0:
        raise ValueError("mask is all zeros: the mean over removed patches does not exist")


class _MaskedMse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *args: Any) -> Tensor:
        pred, imgs, mask, *options, mean, std = args
        ctx.save_for_backward(pred, imgs, mask, mean, std)
        ctx.backend, ctx.options = backend, options
        return dispatch.ops_of(backend).masked_mse_fwd(*args)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        pred, imgs, mask, mean, std = ctx.saved_tensors
        dpred = _MaskedMseGradient.apply(ctx.backend, dloss, pred, imgs, mask, *ctx.options, mean, std)
        return None, dpred, None, None, None, None, None, None, None


class _MaskedMseGradient(torch.autograd.Function):
    """dpred as a Function, so that a second derivative raises: once_differentiable lets a constant
    dloss pass."""

    @staticmethod
    def forward(ctx: Any, backend: str, *args: Any) -> Tensor:
        return dispatch.ops_of(backend).masked_mse_bwd(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError('masked_mse is once_differentiable on this backend; maefast.backend("eager") has second derivatives')


@register_fake("masked_mse_fwd")
def _masked_mse_fwd_fake(pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty((), dtype=torch.float32)


@register_fake("masked_mse_bwd")
def _masked_mse_bwd_fake(dloss: Tensor, pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty(pred.shape)
