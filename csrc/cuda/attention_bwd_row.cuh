// Backward pass for rows of one tile (T <= 80): one CTA per sample and head, one warp per 16
// queries and later per 16 keys. A warp holds the scores of its queries against all keys in
// registers. It computes delta = rowsum(P * dP) from them and does not read O.
#pragma once

#include "attention_bwd.cuh"

namespace maefast::cuda {

// s (16 queries, keys) = a (16 queries, D) * b (keys, D)^T
template <typename Element, int D, int kFragments>
__device__ __forceinline__ void row_scores(float (&s)[kFragments][4], uint32_t a_tile, int row0, uint32_t b_tile) {
  const Block<D, Order::kRowMajor> a_block(a_tile);
  const Block<D, Order::kColMajor> b_block(b_tile);
  clear(s);
#pragma unroll
  for (int ks = 0; ks < D / 16; ++ks) {
    uint32_t a[4];
    ldmatrix_x4(a, a_block(row0, 2 * ks));
#pragma unroll
    for (int i = 0; i + 1 < kFragments; i += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, b_block(8 * i, 2 * ks));
      mma_m16n8k16<Element>(s[i], a, b[0], b[1]);
      mma_m16n8k16<Element>(s[i + 1], a, b[2], b[3]);
    }
    if constexpr (kFragments % 2) {
      uint32_t b[2];
      ldmatrix_x2(b, b_block(8 * (kFragments - 1), 2 * ks));
      mma_m16n8k16<Element>(s[kFragments - 1], a, b[0], b[1]);
    }
  }
}

// acc (16 keys, D) = columns [key0, key0 + 16) of the scores (queries, keys), transposed, times b
// (queries, D)
template <typename Element, int D, int kRows>
__device__ __forceinline__ void over_queries(float (&acc)[D / 8][4], uint32_t score_tile, int key0, uint32_t b_tile) {
  const uint32_t a_address = block_address<kRows, Order::kColMajor>(score_tile, key0 / 8);
  const Block<D, Order::kRowMajor> b_block(b_tile);
  clear(acc);
#pragma unroll
  for (int query = 0; query < kRows; query += kMmaRows) {
    uint32_t a[4];
    ldmatrix_x4_trans(a, a_address + query * Tile<kRows>::kStride);
#pragma unroll
    for (int i = 0; i < D / 8; i += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, b_block(query, i));
      mma_m16n8k16<Element>(acc[i], a, b[0], b[1]);
      mma_m16n8k16<Element>(acc[i + 1], a, b[2], b[3]);
    }
  }
}

// grid N * h
template <typename Element, typename Line>
__global__ void __launch_bounds__(Line::kTile.threads, resident(Line::kTile, kMultiprocessorBytes))
    attention_bwd_row_kernel(BackwardArgs a) {
  constexpr BackwardTile kTile = Line::kTile;
  constexpr int D = kTile.head_width, kRows = kTile.tile_rows, kFragments = kTile.chunk / 8, kTileBytes = kTile.tile_bytes();
  // Q, K, V, dO, then P and dS as (queries, keys)
  const uint32_t q_tile = shared_address(shared<uint4>()), k_tile = q_tile + kTileBytes, v_tile = k_tile + kTileBytes,
                 do_tile = v_tile + kTileBytes, p_tile = do_tile + kTileBytes, ds_tile = p_tile + kTile.score_bytes();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, row0 = warp * kMmaRows;
  const int64_t n = blockIdx.x / a.h;
  const int T = a.T, head = blockIdx.x % a.h, width = a.h * D;

  const uint16_t* src = a.qkv + n * T * 3 * width + head * D;
  load_tiles<D, 2, kTileBytes>(q_tile, src, 3 * width, width, T, kRows);
  cp_async_commit_group();
  load_tiles<D, 1, kTileBytes>(v_tile, src + 2 * width, 3 * width, width, T, kRows);
  load_tiles<D, 1, kTileBytes>(do_tile, a.dout + n * T * width + head * D, width, width, T, kRows);
  cp_async_commit_group();
  if constexpr (kTile.prefetch) {
    if (blockIdx.x + a.ahead < gridDim.x) prefetch_rows<D>(a, blockIdx.x + a.ahead, false);
  }
  float lse_log2[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = row0 + lane / 4 + 8 * half;
    lse_log2[half] = t < T ? a.lse[blockIdx.x * static_cast<int64_t>(T) + t] * kLog2e : INFINITY;  // P = 0 past T
  }

  float p[kFragments][4], ds[kFragments][4];
  cp_async_wait_group<1>();
  __syncthreads();
  row_scores<Element, D>(p, q_tile, row0, k_tile);
  cp_async_wait_group<0>();
  __syncthreads();
  row_scores<Element, D>(ds, do_tile, row0, v_tile);

  float delta[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      p[i][j] = ex2_approx(fmaf(p[i][j], a.scale_log2, -lse_log2[j / 2]));
      if (8 * i + 8 > T && 8 * i + lane % 4 * 2 + j % 2 >= T) p[i][j] = 0.0f;
      delta[j / 2] += p[i][j] * ds[i][j];
    }
  }
  delta[0] = quad_sum(delta[0]);
  delta[1] = quad_sum(delta[1]);

  constexpr int kSteps = (kFragments + 1) / 2;
  uint32_t ds_a[kSteps][4];  // A fragments for dQ
  const Block<kRows, Order::kRowMajor> p_block(p_tile), ds_block(ds_tile);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t p_a[4] = {0, 0, 0, 0};
    ds_a[step][2] = ds_a[step][3] = 0;
#pragma unroll
    for (int k = 0; k < 2 && 2 * step + k < kFragments; ++k) {
      const int i = 2 * step + k;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float p0 = p[i][2 * half], p1 = p[i][2 * half + 1];
        p_a[2 * k + half] = Element::pack(p0, p1);
        ds_a[step][2 * k + half] = Element::pack(p0 * (ds[i][2 * half] - delta[half]), p1 * (ds[i][2 * half + 1] - delta[half]));
      }
    }
    stmatrix_x4(p_block(row0, 2 * step), p_a);
    stmatrix_x4(ds_block(row0, 2 * step), ds_a[step]);
  }
  __syncthreads();

  // No warp reads V any more: its rows stage the results. Only this warp reads the columns of P of
  // its keys; once it has dV, they hold its sums.
  const uint32_t stage = v_tile + row0 * D * 2;
  const auto sums_at = [&](int warp, int k, int column) {
    return p_tile + Tile<kRows>::offset((k * D + column) / 8, 2 * warp + column % 8 / 4) + column % 4 * 4;
  };
  uint16_t* dst = a.dqkv + (n * T + row0) * 3 * width + head * D;
  const float one[2] = {1.0f, 1.0f}, scales[2] = {a.scale, a.scale};
  if (row0 < T) {
    float acc[D / 8][4];
    clear(acc);
    const Block<D, Order::kRowMajor> k_block(k_tile);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < D / 8; i += 2) {
        uint32_t k[4];
        ldmatrix_x4_trans(k, k_block(16 * step, i));
        mma_m16n8k16<Element>(acc[i], ds_a[step], k[0], k[1]);
        mma_m16n8k16<Element>(acc[i + 1], ds_a[step], k[2], k[3]);
      }
    }
    store_rows<Element, D>(acc, scales, stage, dst, 3 * width, T - row0);
    ColumnSums<Element, D> dq_sums, dv_sums, dk_sums;
    if (a.sums) dq_sums.add(stage);
    over_queries<Element, D, kRows>(acc, p_tile, row0, do_tile);
    store_rows<Element, D>(acc, one, stage, dst + 2 * width, 3 * width, T - row0);
    if (a.sums) {
      dv_sums.add(stage);
      dq_sums.store([&](int column) { return sums_at(warp, 0, column); });
      dv_sums.store([&](int column) { return sums_at(warp, 2, column); });
    }
    over_queries<Element, D, kRows>(acc, ds_tile, row0, q_tile);
    store_rows<Element, D>(acc, scales, stage, dst + width, 3 * width, T - row0);
    if (a.sums) {
      dk_sums.add(stage);
      dk_sums.store([&](int column) { return sums_at(warp, 1, column); });
    }
  }
  if (a.sums == nullptr) return;
  __syncthreads();
  const int warps = (T + kMmaRows - 1) / kMmaRows;
  store_sums<D>(a, [&](int) { return warps; }, [&](int k, int column, int warp) { return sums_at(warp, k, column); });
}

}  // namespace maefast::cuda
