"""random_masking on a GPU: a rank is the number of smaller values, counted by tiles of a warp."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import launch

TILE = 32


@triton.jit
def _order_key(noise):
    """Return an int32 that orders like the float: -0 equals +0, every NaN is the largest."""
    bits = noise.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, 0x7F800001, key)


@triton.jit
def _keys(noise_ptr, index, L):
    return tl.where(index < L, _order_key(tl.load(noise_ptr + index, mask=index < L, other=0.0)), 0x7FFFFFFF)


@triton.jit
def _random_masking_fwd_kernel(noise_ptr, ids_keep_ptr, ids_restore_ptr, mask_ptr, L, K, tiles, TILE: tl.constexpr):
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    noise_ptr += n * L
    lane = tl.arange(0, TILE)
    i = tile * TILE + lane
    key = _keys(noise_ptr, i, L)
    count = tl.zeros([TILE, TILE], tl.int32)
    # a tie with an earlier tile counts: its key is below key + 1, and keys stop short of overflow
    for other in range(tiles):
        bound = tl.where(other < tile, key + 1, key)
        count += (_keys(noise_ptr, other * TILE + lane, L)[None, :] < bound[:, None]).to(tl.int32)
    count += ((key[None, :] == key[:, None]) & (lane[None, :] < lane[:, None])).to(tl.int32)
    rank = tl.sum(count, axis=1)
    tl.store(ids_restore_ptr + n * L + i, rank.to(tl.int64), mask=i < L)
    tl.store(mask_ptr + n * L + i, (rank >= K).to(tl.float32), mask=i < L)
    tl.store(ids_keep_ptr + n * K + rank, i.to(tl.int64), mask=(i < L) & (rank < K))


def random_masking_fwd(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    N, L = noise.shape
    noise = noise.contiguous()
    ids_keep = torch.empty(N, len_keep, dtype=torch.int64, device=noise.device)
    ids_restore = torch.empty(N, L, dtype=torch.int64, device=noise.device)
    mask = torch.empty_like(noise)
    if noise.numel():
        tiles = triton.cdiv(L, TILE)
        launch(
            _random_masking_fwd_kernel,
            (N * tiles,),
            noise_ptr=noise,
            ids_keep_ptr=ids_keep,
            ids_restore_ptr=ids_restore,
            mask_ptr=mask,
            L=L,
            K=len_keep,
            tiles=tiles,
            TILE=TILE,
            num_warps=1,
        )
    return ids_keep, ids_restore, mask
