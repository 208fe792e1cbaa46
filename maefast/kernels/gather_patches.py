"""gather_patches on a GPU: a tile is some kept patches x some of their values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuned import tile_for
from ._common import column_block, dense_statistics, launch, normalised, strides_of


@triton.jit
def _gather_patches_fwd_kernel(
    imgs_ptr,
    ids_ptr,
    mean_ptr,
    std_ptr,
    out_ptr,
    rows,
    K,
    grid_h,
    grid_w,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    P: tl.constexpr = C * PH * PW
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    patch = tl.load(ids_ptr + row, mask=row < rows, other=-1)
    readable = (patch >= 0) & (patch < grid_h * grid_w)
    patch = patch.to(tl.int32)
    patch_y, patch_x = (patch // grid_w).to(tl.int64), (patch % grid_w).to(tl.int64)
    first = (row // K).to(tl.int64) * stride_n + patch_y * (PH * stride_h) + patch_x * (PW * stride_w)  # [ROWS]

    value = tl.program_id(1) * COLS + tl.arange(0, COLS)
    c, y, x = value // (PH * PW), value // PW % PH, value % PW
    offset = c.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w  # [COLS]

    pixel = tl.load(imgs_ptr + first[:, None] + offset[None, :], mask=readable[:, None] & (value < P)[None, :], other=0)
    if imgs_ptr.dtype.element_ty == tl.uint8:
        if mean_ptr is None:
            pixel = normalised(pixel, 0.0, 1.0)
        else:
            rstd = tl.div_rn(1.0, tl.load(std_ptr + c, mask=value < P, other=1.0))
            pixel = normalised(pixel, tl.load(mean_ptr + c, mask=value < P, other=0.0)[None, :], rstd[None, :])
    at = row.to(tl.int64)[:, None] * P + value[None, :]
    tl.store(out_ptr + at, pixel.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (value < P)[None, :])


def launch_config(P: int, device: torch.device) -> dict[str, int]:
    cols = column_block(P)
    return tile_for("gather_patches_fwd", P, device, {"ROWS": 4096 // cols, "COLS": cols, "num_warps": 4})


def gather_patches_fwd(
    imgs: Tensor, ids: Tensor, patch_h: int, patch_w: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Gather patches; one whose id is out of range holds zeros."""
    (N, K), (_, C, H, W) = ids.shape, imgs.shape
    P = C * patch_h * patch_w
    mean, std = dense_statistics(mean, std)
    out = torch.empty(N, K, P, dtype=dtype, device=imgs.device)
    if out.numel():
        tile = launch_config(P, imgs.device)
        grid = (triton.cdiv(N * K, tile["ROWS"]), triton.cdiv(P, tile["COLS"]))
        launch(
            _gather_patches_fwd_kernel,
            grid,
            imgs_ptr=imgs,
            ids_ptr=ids.contiguous(),
            mean_ptr=mean,
            std_ptr=std,
            out_ptr=out,
            rows=N * K,
            K=K,
            grid_h=H // patch_h,
            grid_w=W // patch_w,
            **strides_of(imgs),
            C=C,
            PH=patch_h,
            PW=patch_w,
            **tile,
        )
    return out
