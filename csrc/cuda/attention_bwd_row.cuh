// Backward for rows of one tile (T <= 80): one CTA per sample and head, one warp per 16 queries and, later, per 16 keys.
// A warp holds the scores of its queries against all keys in registers, so delta = rowsum(P * dP) is at hand and O is not read.
#pragma once

#include "tile.cuh"

namespace maefast::cuda {

template <int D, int kBlocks>
struct RowBackward {
  static constexpr int kRows = 16 * kBlocks, kThreads = 32 * kBlocks;
  static constexpr int kTileBytes = kRows * D * 2, kScoreBytes = kRows * kRows * 2;
  static constexpr int kShared = 4 * kTileBytes + 2 * kScoreBytes;  // Q, K, V, dO, then P and dS as (queries, keys)
};

// s (16 queries, keys) = a (16 queries, D) * b (keys, D)^T
template <typename Half, int D, int kTiles>
__device__ __forceinline__ void row_scores(float (&s)[kTiles][4], uint32_t a_tile, int row0, uint32_t b_tile) {
  const Block<D, Order::kRowMajor> a_block(a_tile);
  const Block<D, Order::kColMajor> b_block(b_tile);
  clear(s);
#pragma unroll
  for (int ks = 0; ks < D / 16; ++ks) {
    uint32_t a[4];
    load_matrix(a, a_block(row0, 2 * ks));
#pragma unroll
    for (int i = 0; i + 1 < kTiles; i += 2) {
      uint32_t b[4];
      load_matrix(b, b_block(8 * i, 2 * ks));
      Half::mma(s[i], a, b[0], b[1]);
      Half::mma(s[i + 1], a, b[2], b[3]);
    }
    if constexpr (kTiles % 2) {
      uint32_t b[2];
      load_matrix_half(b, b_block(8 * (kTiles - 1), 2 * ks));
      Half::mma(s[kTiles - 1], a, b[0], b[1]);
    }
  }
}

// acc (16 keys, D) = columns [key0, key0 + 16) of the scores (queries, keys), transposed, times b (queries, D)
template <typename Half, int D, int kBlocks>
__device__ __forceinline__ void over_queries(float (&acc)[D / 8][4], uint32_t score_tile, int key0, uint32_t b_tile) {
  const uint32_t a_address = block_address<16 * kBlocks, Order::kColMajor>(score_tile, key0 / 8);
  const Block<D, Order::kRowMajor> b_block(b_tile);
  clear(acc);
#pragma unroll
  for (int step = 0; step < kBlocks; ++step) {
    uint32_t a[4];
    load_matrix_trans(a, a_address + 16 * step * Tile<16 * kBlocks>::kStride);
#pragma unroll
    for (int i = 0; i < D / 8; i += 2) {
      uint32_t b[4];
      load_matrix_trans(b, b_block(16 * step, i));
      Half::mma(acc[i], a, b[0], b[1]);
      Half::mma(acc[i + 1], a, b[2], b[3]);
    }
  }
}

// qkv and dqkv (N, T, 3*h*D), lse (N, h, T), dout (N, T, h*D); grid N * h. kTiles tiles of 8 keys hold the row.
template <typename Half, int D, int kBlocks, int kTiles, int kPerSM>
__global__ void __launch_bounds__(32 * kBlocks, kPerSM)
    attention_bwd_row_kernel(const uint16_t* __restrict__ qkv, const float* __restrict__ lse, const uint16_t* __restrict__ dout,
                             uint16_t* __restrict__ dqkv, int T, int h, float scale) {
  using Shape = RowBackward<D, kBlocks>;
  extern __shared__ uint4 shared[];
  const uint32_t q_tile = shared_address(shared), k_tile = q_tile + Shape::kTileBytes, v_tile = k_tile + Shape::kTileBytes,
                 do_tile = v_tile + Shape::kTileBytes, p_tile = do_tile + Shape::kTileBytes,
                 ds_tile = p_tile + Shape::kScoreBytes;
  const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16;
  const int64_t n = blockIdx.x / h;
  const int head = blockIdx.x % h, width = h * D;

  const uint16_t* src = qkv + n * T * 3 * width + head * D;
  load_tiles<D, 2, Shape::kTileBytes>(q_tile, src, 3 * width, width, T, Shape::kRows);
  copy_async_commit();
  load_tiles<D, 1, Shape::kTileBytes>(v_tile, src + 2 * width, 3 * width, width, T, Shape::kRows);
  load_tiles<D, 1, Shape::kTileBytes>(do_tile, dout + n * T * width + head * D, width, width, T, Shape::kRows);
  copy_async_commit();
  float lse_log2[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = row0 + lane / 4 + 8 * half;
    lse_log2[half] = t < T ? lse[blockIdx.x * static_cast<int64_t>(T) + t] * kLog2e : INFINITY;  // a row past T weighs nothing
  }
  const float scale_log2 = scale * kLog2e;

  float p[kTiles][4], ds[kTiles][4];
  copy_async_wait<1>();
  __syncthreads();
  row_scores<Half, D>(p, q_tile, row0, k_tile);
  copy_async_wait<0>();
  __syncthreads();
  row_scores<Half, D>(ds, do_tile, row0, v_tile);

  float delta[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      p[i][j] = exp2_quick(fmaf(p[i][j], scale_log2, -lse_log2[j / 2]));
      if (8 * i + 8 > T && 8 * i + lane % 4 * 2 + j % 2 >= T) p[i][j] = 0.0f;
      delta[j / 2] += p[i][j] * ds[i][j];
    }
  }
  delta[0] = quad_sum(delta[0]);
  delta[1] = quad_sum(delta[1]);

  constexpr int kSteps = (kTiles + 1) / 2;
  uint32_t ds_half[kSteps][4];  // A fragments for dQ
  const Block<Shape::kRows, Order::kRowMajor> p_block(p_tile), ds_block(ds_tile);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t p_half[4] = {0, 0, 0, 0};
    ds_half[step][2] = ds_half[step][3] = 0;
#pragma unroll
    for (int k = 0; k < 2 && 2 * step + k < kTiles; ++k) {
      const int i = 2 * step + k;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float p0 = p[i][2 * half], p1 = p[i][2 * half + 1];
        p_half[2 * k + half] = Half::pack(p0, p1);
        ds_half[step][2 * k + half] = Half::pack(p0 * (ds[i][2 * half] - delta[half]), p1 * (ds[i][2 * half + 1] - delta[half]));
      }
    }
    store_matrix(p_block(row0, 2 * step), p_half);
    store_matrix(ds_block(row0, 2 * step), ds_half[step]);
  }
  __syncthreads();

  // No warp reads V any more: its rows carry the results to global memory.
  if (row0 >= T) return;
  const uint32_t stage = v_tile + row0 * D * 2;
  uint16_t* dst = dqkv + (n * T + row0) * 3 * width + head * D;
  const float one[2] = {1.0f, 1.0f}, scales[2] = {scale, scale};
  float acc[D / 8][4];
  clear(acc);
  const Block<D, Order::kRowMajor> k_block(k_tile);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < D / 8; i += 2) {
      uint32_t k[4];
      load_matrix_trans(k, k_block(16 * step, i));
      Half::mma(acc[i], ds_half[step], k[0], k[1]);
      Half::mma(acc[i + 1], ds_half[step], k[2], k[3]);
    }
  }
  store_rows<Half, D>(acc, scales, stage, dst, 3 * width, T - row0);
  over_queries<Half, D, kBlocks>(acc, p_tile, row0, do_tile);
  store_rows<Half, D>(acc, one, stage, dst + 2 * width, 3 * width, T - row0);
  over_queries<Half, D, kBlocks>(acc, ds_tile, row0, q_tile);
  store_rows<Half, D>(acc, scales, stage, dst + width, 3 * width, T - row0);
}

}  // namespace maefast::cuda
