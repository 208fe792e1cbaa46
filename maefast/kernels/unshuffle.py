"""unshuffle on a GPU. Forward: a tile is one token of several samples, which share its position.
Backward: a row of dy is copied into dx or added to the gradient of the mask token, summed by chunks
that a second kernel adds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuned import tile_for
from ._common import column_block, dense_rows, launch, rows_per_chunk, sum_columns


@triton.jit
def _unshuffle_fwd_kernel(
    x_ptr,
    ids_restore_ptr,
    mask_token_ptr,
    pos_embed_ptr,
    out_ptr,
    N,
    L,
    K,
    D,
    stride_n,
    stride_t,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    token = tl.program_id(0) % (L + 1)
    n = (tl.program_id(0) // (L + 1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    # token 0 of x is the class token, so its rank is -1; other ranks out of range are mask tokens
    rank = tl.load(ids_restore_ptr + n * L + token - 1, mask=n < tl.where(token > 0, N, 0), other=-1)
    kept = (rank < K) & (rank >= tl.where(token > 0, 0, -1))
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (n < N)[:, None] & (d < D)[None, :]
    value = tl.load(x_ptr + (n * stride_n + (1 + rank) * stride_t)[:, None] + d[None, :], mask=inside & kept[:, None], other=0.0)
    filler = tl.load(mask_token_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    position = tl.load(pos_embed_ptr + token.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    value = tl.where(kept[:, None], value.to(tl.float32), filler[None, :]) + position[None, :]
    at = (n * (L + 1) + token) * D
    tl.store(out_ptr + at[:, None] + d[None, :], value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _unshuffle_bwd_kernel(
    dy_ptr,
    ids_restore_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    L,
    K,
    D,
    stride_n,
    stride_t,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for step in range(0, CHUNK, ROWS):
        row = tl.program_id(0) * CHUNK + step + tl.arange(0, ROWS)
        n, token = (row // (L + 1)).to(tl.int64), row % (L + 1)
        rank = tl.load(ids_restore_ptr + n * L + token - 1, mask=(row < rows) & (token > 0), other=-1)
        kept = (rank < K) & ((rank >= 0) | (token == 0))
        inside = (row < rows)[:, None] & (d < D)[None, :]
        value = tl.load(dy_ptr + (n * stride_n + token.to(tl.int64) * stride_t)[:, None] + d[None, :], mask=inside, other=0.0)
        at = (n * (1 + K) + 1 + rank) * D
        tl.store(dx_ptr + at[:, None] + d[None, :], value.to(dx_ptr.dtype.element_ty), mask=inside & kept[:, None])
        total += tl.where(kept[:, None], 0.0, value.to(tl.float32))
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + d, tl.sum(total, axis=0), mask=d < D)


def launch_config(kernel: str, D: int, device: torch.device) -> dict[str, int]:
    cols = column_block(D)
    return tile_for(kernel, D, device, {"ROWS": min(16, 4096 // cols), "COLS": cols, "num_warps": 4})


def unshuffle_fwd(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    (N, L), D = ids_restore.shape, x.shape[2]
    x, dtype = dense_rows(x), torch.promote_types(torch.promote_types(x.dtype, mask_token.dtype), pos_embed.dtype)
    out = torch.empty(N, 1 + L, D, dtype=dtype, device=x.device)
    if out.numel():
        tile = launch_config("unshuffle_fwd", D, x.device)
        grid = ((1 + L) * triton.cdiv(N, tile["ROWS"]), triton.cdiv(D, tile["COLS"]))
        launch(
            _unshuffle_fwd_kernel,
            grid,
            x_ptr=x,
            ids_restore_ptr=ids_restore.contiguous(),
            mask_token_ptr=mask_token.contiguous(),
            pos_embed_ptr=pos_embed.contiguous(),
            out_ptr=out,
            N=N,
            L=L,
            K=x.shape[1] - 1,
            D=D,
            stride_n=x.stride(0),
            stride_t=x.stride(1),
            **tile,
        )
    return out


def unshuffle_bwd(dy: Tensor, ids_restore: Tensor, len_keep: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    N, tokens, D = dy.shape
    dy, ids_restore = dense_rows(dy), ids_restore.contiguous()
    dx = torch.empty(N, 1 + len_keep, D, dtype=dtype, device=dy.device)
    if dy.numel() == 0:
        return dx, torch.zeros(1, 1, D, dtype=torch.float32, device=dy.device)
    dmask_token = torch.empty(1, 1, D, dtype=torch.float32, device=dy.device)
    rows, tile = N * tokens, launch_config("unshuffle_bwd", D, dy.device)
    chunks = triton.cdiv(rows, chunk := rows_per_chunk(rows))
    partial = torch.empty(chunks, D, dtype=torch.float32, device=dy.device)
    launch(
        _unshuffle_bwd_kernel,
        (chunks, triton.cdiv(D, tile["COLS"])),
        dy_ptr=dy,
        ids_restore_ptr=ids_restore,
        dx_ptr=dx,
        partial_ptr=partial,
        rows=rows,
        L=tokens - 1,
        K=len_keep,
        D=D,
        stride_n=dy.stride(0),
        stride_t=dy.stride(1),
        CHUNK=chunk,
        **tile,
    )
    sum_columns(partial, dmask_token)
    return dx, dmask_token
