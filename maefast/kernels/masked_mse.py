"""masked_mse on a GPU: one patch at a time in the registers of a warp or a few, as [C, pixels]; the target is never stored.

A program works on GROUP patches of a sample. Patches of weight zero are not read. The loss is summed per program, then over the
programs by a second kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuned import tile_for
from ._common import dense_rows, dense_statistics, launching_on, normalised

VAR_EPS = tl.constexpr(1e-6)  # inside the root


@triton.jit
def _removed_before(weights, patch, BLOCK: tl.constexpr):
    """The number of weights[:patch] that are not zero: the row of this patch in a pred of removed patches."""
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, patch, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count += (tl.load(weights + i, mask=i < patch, other=0.0) != 0).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _error(pred, imgs, pred_at, imgs_at, inside, mean, rstd, P: tl.constexpr, NORM: tl.constexpr):
    """pred - target of one patch [BC, BPIX]; zero outside. Statistics in two passes over the registers."""
    value = tl.load(imgs + imgs_at, mask=inside, other=0)
    guess = tl.load(pred + pred_at, mask=inside, other=0.0).to(tl.float32)
    if imgs.dtype.element_ty == tl.uint8:
        value = normalised(value, mean, rstd)
    target = tl.where(inside, value.to(tl.float32), 0.0)
    if NORM:
        centred = tl.where(inside, target - tl.sum(target) / P, 0.0)
        var = tl.sum(centred * centred) / (P - 1)
        approximate = tl.rsqrt(var + VAR_EPS)  # one Newton step instead of exact functions, whose calls cost registers
        target = centred * (approximate * (1.5 - 0.5 * (var + VAR_EPS) * approximate * approximate))
    return guess - target


@triton.jit
def _statistics(mean, std, c, C: tl.constexpr):
    if mean is None:
        return 0.0, 1.0
    else:  # noqa: RET505  a Triton function with two returns needs both branches
        return tl.load(mean + c, mask=c < C, other=0.0), tl.div_rn(1.0, tl.load(std + c, mask=c < C, other=1.0))


@triton.jit
def _masked_mse_fwd_kernel(
    pred,
    imgs,
    mask,
    mean,
    std,
    partial,
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
    n = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * GROUP
    weights = mask + n * L
    c, pixel = tl.arange(0, BC)[:, None], tl.arange(0, BPIX)[None, :]
    inside = (c < C) & (pixel < PH * PW)
    y, x = (pixel // PW).to(tl.int64), (pixel % PW).to(tl.int64)
    imgs_at = c.to(tl.int64) * stride_c + y * stride_h + x * stride_w
    pred_at = pixel * C + c
    average, rstd = _statistics(mean, std, c, C)
    row = first
    if COMPACT:
        row = _removed_before(weights, first, 256)
    total, weight = 0.0, 0.0
    for i in range(first, tl.minimum(first + GROUP, L)):
        w = tl.load(weights + i)
        weight += w
        if (w != 0) & (row < M):
            corner = n * stride_n + (i // grid_w).to(tl.int64) * (PH * stride_h) + (i % grid_w).to(tl.int64) * (PW * stride_w)
            pred_row = pred + n * pred_stride_n + row.to(tl.int64) * pred_stride_l
            error = _error(pred_row, imgs + corner, pred_at, imgs_at, inside, average, rstd, C * PH * PW, NORM)
            total += w * tl.sum(error * error)
        row += (w != 0).to(tl.int32) if COMPACT else 1
    tl.store(partial + tl.program_id(0), total)
    tl.store(partial + tl.num_programs(0) + tl.program_id(0), weight)


@triton.jit
def _masked_mse_sum_kernel(partial, loss, programs, P, BLOCK: tl.constexpr):
    total, weight = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, programs, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partial + i, mask=i < programs, other=0.0)
        weight += tl.load(partial + programs + i, mask=i < programs, other=0.0)
    tl.store(loss, tl.div_rn(tl.sum(total), tl.sum(weight) * P))


@triton.jit
def _masked_mse_bwd_kernel(
    dloss,
    sum_mask,
    pred,
    imgs,
    mask,
    mean,
    std,
    dpred,
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
    weights = mask + n * L
    c, pixel = tl.arange(0, BC)[:, None], tl.arange(0, BPIX)[None, :]
    inside = (c < C) & (pixel < PH * PW)
    y, x = (pixel // PW).to(tl.int64), (pixel % PW).to(tl.int64)
    imgs_at = c.to(tl.int64) * stride_c + y * stride_h + x * stride_w
    pred_at = pixel * C + c
    flat = tl.arange(0, BC * BPIX)
    zeros = tl.zeros([BC * BPIX], dpred.dtype.element_ty)
    average, rstd = _statistics(mean, std, c, C)
    scale = tl.div_rn(tl.load(dloss) * 2.0, tl.load(sum_mask) * P)
    row = first
    if COMPACT:
        row = _removed_before(weights, first, 256)
    for i in range(first, tl.minimum(first + GROUP, L)):
        w = tl.load(weights + i)
        dpred_row = dpred + (n * M + row) * P
        if (w != 0) & (row < M):
            corner = n * stride_n + (i // grid_w).to(tl.int64) * (PH * stride_h) + (i % grid_w).to(tl.int64) * (PW * stride_w)
            pred_row = pred + n * pred_stride_n + row.to(tl.int64) * pred_stride_l
            error = _error(pred_row, imgs + corner, pred_at, imgs_at, inside, average, rstd, P, NORM)
            tl.store(dpred_row + pred_at, (error * (scale * w)).to(dpred.dtype.element_ty), mask=inside)
        elif not COMPACT:
            tl.store(dpred_row + flat, zeros, mask=flat < P)
        row += (w != 0).to(tl.int32) if COMPACT else 1
    if COMPACT and first + GROUP >= L:  # a mask that removes fewer than M leaves rows that belong to no patch
        for unused in range(row, M):
            tl.store(dpred + (n * M + unused) * P + flat, zeros, mask=flat < P)


def config(kernel: str, N: int, L: int, C: int, pixels: int, device: torch.device) -> dict[str, int]:
    """GROUP, a rule of the shape alone, so that the order of the sum is: enough programs for a large GPU, few enough to start
    quickly."""
    tile_c, tile_pixels = triton.next_power_of_2(C), triton.next_power_of_2(pixels)
    group = min(8, max(1, triton.next_power_of_2(N * L // 8192)))
    rule = {"GROUP": group, "BC": tile_c, "BPIX": tile_pixels, "num_warps": max(1, tile_c * tile_pixels // 1024), "maxnreg": 128}
    return tile_for(kernel, C * pixels, device, rule)


def masked_mse_fwd(
    pred: Tensor,
    imgs: Tensor,
    mask: Tensor,
    patch_h: int,
    patch_w: int,
    norm_pix: bool,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    (N, L), (M, P), C = mask.shape, pred.shape[1:], imgs.shape[1]
    if N == 0:
        return torch.full((), float("nan"), dtype=torch.float32, device=pred.device)
    pred, mask = dense_rows(pred), mask.contiguous()
    mean, std = dense_statistics(mean, std)
    tile = config("masked_mse_fwd", N, L, C, patch_h * patch_w, pred.device)
    groups = triton.cdiv(L, tile["GROUP"])
    partial = torch.empty(2, N * groups, dtype=torch.float32, device=pred.device)
    loss = torch.empty((), dtype=torch.float32, device=pred.device)
    with launching_on(pred):
        _masked_mse_fwd_kernel[(N * groups,)](
            pred, imgs, mask, mean, std, partial, L, M, groups, imgs.shape[3] // patch_w, pred.stride(0), pred.stride(1),
            *imgs.stride(), C, patch_h, patch_w, norm_pix, M < L, **tile,
        )  # fmt: skip
        _masked_mse_sum_kernel[(1,)](partial, loss, N * groups, P, BLOCK=4096, num_warps=16)
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
    (N, L), (M, P), C = mask.shape, pred.shape[1:], imgs.shape[1]
    dpred = torch.empty(N, M, P, dtype=pred.dtype, device=pred.device)
    if N == 0:
        return dpred
    pred, mask = dense_rows(pred), mask.contiguous()
    mean, std = dense_statistics(mean, std)
    tile = config("masked_mse_bwd", N, L, C, patch_h * patch_w, pred.device)
    groups = triton.cdiv(L, tile["GROUP"])
    with launching_on(pred):
        _masked_mse_bwd_kernel[(N * groups,)](
            dloss, mask.sum(), pred, imgs, mask, mean, std, dpred, L, M, groups, imgs.shape[3] // patch_w, pred.stride(0),
            pred.stride(1), *imgs.stride(), C, patch_h, patch_w, norm_pix, M < L, **tile,
        )  # fmt: skip
    return dpred
