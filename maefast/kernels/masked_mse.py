"""masked_mse on a GPU: a patch is held in registers, as [C, pixels]; the target is never stored.

A program works on GROUP patches of a sample. Patches of weight zero are not read. The loss is
summed per program, then over the programs by a second kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuned import tile_for
from ._common import dense_rows, dense_statistics, launch, normalised, strides_of

VAR_EPS = tl.constexpr(1e-6)  # inside the root


@triton.jit
def _removed_before(weights_ptr, patch, BLOCK: tl.constexpr):
    """Return the number of nonzero weights[:patch]: the row of a patch among removed ones."""
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, patch, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count += (tl.load(weights_ptr + i, mask=i < patch, other=0.0) != 0).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _error(pred_ptr, imgs_ptr, pred_at, imgs_at, inside, mean, rstd, P: tl.constexpr, NORM: tl.constexpr):
    """pred - target of one patch [BC, BPIX], zero outside; statistics in two passes."""
    value = tl.load(imgs_ptr + imgs_at, mask=inside, other=0)
    guess = tl.load(pred_ptr + pred_at, mask=inside, other=0.0).to(tl.float32)
    if imgs_ptr.dtype.element_ty == tl.uint8:
        value = normalised(value, mean, rstd)
    target = tl.where(inside, value.to(tl.float32), 0.0)
    if NORM:
        centred = tl.where(inside, target - tl.sum(target) / P, 0.0)
        var = tl.sum(centred * centred) / (P - 1)
        approximate = tl.rsqrt(var + VAR_EPS)  # and a Newton step: calls of exact functions cost registers
        target = centred * (approximate * (1.5 - 0.5 * (var + VAR_EPS) * approximate * approximate))
    return guess - target


@triton.jit
def _statistics(mean_ptr, std_ptr, c, C: tl.constexpr):
    if mean_ptr is None:
        return 0.0, 1.0
    else:  # noqa: RET505  a Triton function with two returns needs both branches
        return tl.load(mean_ptr + c, mask=c < C, other=0.0), tl.div_rn(1.0, tl.load(std_ptr + c, mask=c < C, other=1.0))


@triton.jit
def _masked_mse_fwd_kernel(
    pred_ptr,
    imgs_ptr,
    mask_ptr,
    mean_ptr,
    std_ptr,
    partial_ptr,
    L,
    M,
    groups,
    grid_w,
    pred_stride_n,
    pred_stride_l,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    NORM: tl.constexpr,
    COMPACT: tl.constexpr,
    GROUP: tl.constexpr,
    BC: tl.constexpr,
    BPIX: tl.constexpr,
):
    P: tl.constexpr = C * PH * PW
    n = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * GROUP
    weights = mask_ptr + n * L
    c, pixel = tl.arange(0, BC)[:, None], tl.arange(0, BPIX)[None, :]
    inside = (c < C) & (pixel < PH * PW)
    y, x = (pixel // PW).to(tl.int64), (pixel % PW).to(tl.int64)
    imgs_at = c.to(tl.int64) * stride_c + y * stride_h + x * stride_w
    pred_at = pixel * C + c
    average, rstd = _statistics(mean_ptr, std_ptr, c, C)
    row = _removed_before(weights, first, 256) if COMPACT else first
    total, weight = 0.0, 0.0
    for i in range(first, tl.minimum(first + GROUP, L)):
        w = tl.load(weights + i)
        weight += w
        if (w != 0) & (row < M):
            corner = n * stride_n + (i // grid_w).to(tl.int64) * (PH * stride_h) + (i % grid_w).to(tl.int64) * (PW * stride_w)
            pred_row = pred_ptr + n * pred_stride_n + row.to(tl.int64) * pred_stride_l
            error = _error(pred_row, imgs_ptr + corner, pred_at, imgs_at, inside, mean=average, rstd=rstd, P=P, NORM=NORM)
            total += w * tl.sum(error * error)
        row += (w != 0).to(tl.int32) if COMPACT else 1
    tl.store(partial_ptr + tl.program_id(0), total)
    tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), weight)


@triton.jit
def _masked_mse_sum_kernel(partial_ptr, loss_ptr, programs, P, BLOCK: tl.constexpr):
    total, weight = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, programs, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i, mask=i < programs, other=0.0)
        weight += tl.load(partial_ptr + programs + i, mask=i < programs, other=0.0)
    tl.store(loss_ptr, tl.div_rn(tl.sum(total), tl.sum(weight) * P))


@triton.jit
def _masked_mse_bwd_kernel(
    dloss_ptr,
    sum_mask_ptr,
    pred_ptr,
    imgs_ptr,
    mask_ptr,
    mean_ptr,
    std_ptr,
    dpred_ptr,
    L,
    M,
    groups,
    grid_w,
    pred_stride_n,
    pred_stride_l,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    NORM: tl.constexpr,
    COMPACT: tl.constexpr,
    GROUP: tl.constexpr,
    BC: tl.constexpr,
    BPIX: tl.constexpr,
):
    P: tl.constexpr = C * PH * PW
    n = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * GROUP
    weights = mask_ptr + n * L
    c, pixel = tl.arange(0, BC)[:, None], tl.arange(0, BPIX)[None, :]
    inside = (c < C) & (pixel < PH * PW)
    y, x = (pixel // PW).to(tl.int64), (pixel % PW).to(tl.int64)
    imgs_at = c.to(tl.int64) * stride_c + y * stride_h + x * stride_w
    pred_at = pixel * C + c
    flat = tl.arange(0, BC * BPIX)
    zeros = tl.zeros([BC * BPIX], dpred_ptr.dtype.element_ty)
    average, rstd = _statistics(mean_ptr, std_ptr, c, C)
    scale = tl.div_rn(tl.load(dloss_ptr) * 2.0, tl.load(sum_mask_ptr) * P)
    row = _removed_before(weights, first, 256) if COMPACT else first
    for i in range(first, tl.minimum(first + GROUP, L)):
        w = tl.load(weights + i)
        dpred_row = dpred_ptr + (n * M + row) * P
        if (w != 0) & (row < M):
            corner = n * stride_n + (i // grid_w).to(tl.int64) * (PH * stride_h) + (i % grid_w).to(tl.int64) * (PW * stride_w)
            pred_row = pred_ptr + n * pred_stride_n + row.to(tl.int64) * pred_stride_l
            error = _error(pred_row, imgs_ptr + corner, pred_at, imgs_at, inside, mean=average, rstd=rstd, P=P, NORM=NORM)
            tl.store(dpred_row + pred_at, (error * (scale * w)).to(dpred_ptr.dtype.element_ty), mask=inside)
        elif not COMPACT:
            tl.store(dpred_row + flat, zeros, mask=flat < P)
        row += (w != 0).to(tl.int32) if COMPACT else 1
    if COMPACT and first + GROUP >= L:  # a mask that removes fewer than M leaves rows that belong to no patch
        for unused in range(row, M):
            tl.store(dpred_ptr + (n * M + unused) * P + flat, zeros, mask=flat < P)


def launch_config(kernel: str, N: int, L: int, C: int, pixels: int, device: torch.device) -> dict[str, int]:
    tile_c, tile_pixels = triton.next_power_of_2(C), triton.next_power_of_2(pixels)
    group = min(8, max(1, triton.next_power_of_2(N * L // 8192)))  # the shape alone fixes the order of the sum
    rule = {"GROUP": group, "BC": tile_c, "BPIX": tile_pixels, "num_warps": max(1, tile_c * tile_pixels // 1024), "maxnreg": 128}
    return tile_for(kernel, C * pixels, device, rule)


def _arguments(
    kernel: str, pred: Tensor, imgs: Tensor, mask: Tensor, patch: tuple[int, int], mean: Tensor | None, std: Tensor | None
) -> dict[str, Any]:
    """Return the arguments that the forward and the backward kernel share."""
    (N, L), C, (patch_h, patch_w) = mask.shape, imgs.shape[1], patch
    pred, (mean, std) = dense_rows(pred), dense_statistics(mean, std)
    tile = launch_config(kernel, N, L, C, patch_h * patch_w, pred.device)
    pointers = {"pred_ptr": pred, "imgs_ptr": imgs, "mask_ptr": mask.contiguous(), "mean_ptr": mean, "std_ptr": std}
    sizes = {"L": L, "M": pred.shape[1], "groups": triton.cdiv(L, tile["GROUP"]), "grid_w": imgs.shape[3] // patch_w}
    strides = {"pred_stride_n": pred.stride(0), "pred_stride_l": pred.stride(1)} | strides_of(imgs)
    return pointers | sizes | strides | {"C": C, "PH": patch_h, "PW": patch_w, "COMPACT": pred.shape[1] < L} | tile


def masked_mse_fwd(
    pred: Tensor, imgs: Tensor, mask: Tensor, patch_h: int, patch_w: int, norm_pix: bool, mean: Tensor | None, std: Tensor | None
) -> Tensor:
    if (N := mask.shape[0]) == 0:
        return torch.full((), float("nan"), dtype=torch.float32, device=pred.device)
    arguments = _arguments("masked_mse_fwd", pred, imgs, mask, (patch_h, patch_w), mean, std)
    programs, P = N * arguments["groups"], pred.shape[2]
    partial = torch.empty(2, programs, dtype=torch.float32, device=pred.device)
    loss = torch.empty((), dtype=torch.float32, device=pred.device)
    launch(_masked_mse_fwd_kernel, (programs,), partial_ptr=partial, NORM=norm_pix, **arguments)
    launch(_masked_mse_sum_kernel, (1,), partial_ptr=partial, loss_ptr=loss, programs=programs, P=P, BLOCK=4096, num_warps=16)
    return loss


def masked_mse_bwd(
    dloss: Tensor,
    pred: Tensor,
    imgs: Tensor,
    mask: Tensor,
    patch_h: int,
    patch_w: int,
    norm_pix: bool,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if (N := mask.shape[0]) == 0:
        return dpred
    arguments = _arguments("masked_mse_bwd", pred, imgs, mask, (patch_h, patch_w), mean, std)
    total = arguments["mask_ptr"].sum()  # the dense mask's: strides would change the order of additions
    own = {"dloss_ptr": dloss, "sum_mask_ptr": total, "dpred_ptr": dpred, "NORM": norm_pix}
    launch(_masked_mse_bwd_kernel, (N * arguments["groups"],), **own, **arguments)
    return dpred
