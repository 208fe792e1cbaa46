// Forward: one CTA per sample and head, Q, K and V of the head in shared memory, kBlocks blocks of 16 queries per warp.
// Keys come in chunks of 8 * kTiles with a running maximum and sum; a row that fits one chunk is never rescaled.
#pragma once

#include "tile.cuh"

namespace maefast::cuda {

template <typename Half, int D, int kBlocks, int kRows>
struct Forward {
  static constexpr int kTileBytes = kRows * D * 2, kShared = 3 * kTileBytes;

  uint32_t q[kBlocks][D / 16][4];
  float o[kBlocks][D / 8][4];
  float max[kBlocks][2], sum[kBlocks][2];  // of rows g and g + 8; the sum is this lane's part
  float scale_log2;
  int T;
  Block<D, Order::kColMajor> k_block;
  Block<D, Order::kRowMajor> v_block;

  __device__ __forceinline__ Forward(uint32_t smem, float scale_log2, int T)
      : scale_log2(scale_log2), T(T), k_block(smem + kTileBytes), v_block(smem + 2 * kTileBytes) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      clear(o[b]);
      max[b][0] = max[b][1] = -INFINITY;
      sum[b][0] = sum[b][1] = 0.0f;
    }
  }

  template <int kTiles, bool kFirst, bool kMasked>
  __device__ __forceinline__ void keys(int key0) {
    float s[kBlocks][kTiles][4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) clear(s[b]);
#pragma unroll
    for (int i = 0; i + 1 < kTiles; i += 2) {
#pragma unroll
      for (int ks = 0; ks < D / 16; ++ks) {
        uint32_t k[4];
        load_matrix(k, k_block(key0 + 8 * i, 2 * ks));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          Half::mma(s[b][i], q[b][ks], k[0], k[1]);
          Half::mma(s[b][i + 1], q[b][ks], k[2], k[3]);
        }
      }
    }
    if constexpr (kTiles % 2) {
#pragma unroll
      for (int ks = 0; ks < D / 16; ++ks) {
        uint32_t k[2];
        load_matrix_half(k, k_block(key0 + 8 * (kTiles - 1), 2 * ks));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) Half::mma(s[b][kTiles - 1], q[b][ks], k[0], k[1]);
      }
    }
    constexpr int kSteps = (kTiles + 1) / 2;
    uint32_t p[kBlocks][kSteps][4];
    if constexpr (kMasked) mask(s, key0);
    softmax<kTiles, kFirst>(s);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        p[b][i / 2][i % 2 * 2] = Half::pack(s[b][i][0], s[b][i][1]);
        p[b][i / 2][i % 2 * 2 + 1] = Half::pack(s[b][i][2], s[b][i][3]);
      }
      if constexpr (kTiles % 2) p[b][kSteps - 1][2] = p[b][kSteps - 1][3] = 0;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < D / 8; i += 2) {
        uint32_t v[4];
        load_matrix_trans(v, v_block(key0 + 16 * step, i));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          Half::mma(o[b][i], p[b][step], v[0], v[1]);
          Half::mma(o[b][i + 1], p[b][step], v[2], v[3]);
        }
      }
    }
  }

 private:
  template <int kTiles>
  __device__ __forceinline__ void mask(float (&s)[kBlocks][kTiles][4], int key0) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (key0 + 8 * i + 8 <= T) continue;  // the same for the whole CTA
      const int key = key0 + 8 * i + threadIdx.x % 4 * 2;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (key >= T) s[b][i][0] = s[b][i][2] = -INFINITY;
        if (key + 1 >= T) s[b][i][1] = s[b][i][3] = -INFINITY;
      }
    }
  }

  // Scores become exp2(scale_log2 * (s - max)). max is the maximum of a row or less than 8 / scale_log2 below it: what was summed
  // up is brought to a new maximum only where it has grown by more.
  template <int kTiles, bool kFirst>
  __device__ __forceinline__ void softmax(float (&s)[kBlocks][kTiles][4]) {
    float top[kBlocks][2];
    bool grown = false;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[b][half] = s[b][0][2 * half];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) top[b][half] = fmaxf(top[b][half], fmaxf(s[b][i][2 * half], s[b][i][2 * half + 1]));
        top[b][half] = quad_max(top[b][half]);
        grown = grown || (top[b][half] - max[b][half]) * scale_log2 > 8.0f;
      }
    }
    if (kFirst || __any_sync(0xffffffffu, grown)) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if constexpr (!kFirst) {
            top[b][half] = fmaxf(top[b][half], max[b][half]);
            const float shrink = exp2_quick((max[b][half] - top[b][half]) * scale_log2);
            sum[b][half] *= shrink;
#pragma unroll
            for (int i = 0; i < D / 8; ++i) {
              o[b][i][2 * half] *= shrink;
              o[b][i][2 * half + 1] *= shrink;
            }
          }
          max[b][half] = top[b][half];
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[b][i][j] = exp2_quick(fmaf(s[b][i][j], scale_log2, -max[b][j / 2] * scale_log2));
          sum[b][j / 2] += s[b][i][j];
        }
      }
    }
  }
};

// qkv (N, T, 3*h*D), out (N, T, h*D), lse (N, h, T) natural logarithm; grid N * h. kTiles tiles of 8 keys hold the whole row
// where kWhole, else they (4 or 8) are the chunk.
template <typename Half, int D, int kBlocks, int kRows, int kTiles, bool kWhole, int kThreads, int kPerSM>
__global__ void __launch_bounds__(kThreads, kPerSM)
    attention_fwd_kernel(const uint16_t* __restrict__ qkv, uint16_t* __restrict__ out, float* __restrict__ lse, int T, int h,
                         float scale) {
  using Forward = Forward<Half, D, kBlocks, kRows>;
  extern __shared__ uint4 shared[];
  const uint32_t smem = shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp * 16 * kBlocks;
  const int64_t n = blockIdx.x / h;
  const int head = blockIdx.x % h, width = h * D;
  const int rows = kWhole ? kRows : (T + 15) / 16 * 16;

  const uint16_t* src = qkv + n * T * 3 * width + head * D;
  load_tiles<D, 2, Forward::kTileBytes>(smem, src, 3 * width, width, T, rows);
  copy_async_commit();
  load_tiles<D, 1, Forward::kTileBytes>(smem + 2 * Forward::kTileBytes, src + 2 * width, 3 * width, width, T, rows);
  copy_async_commit();
  const float scale_log2 = scale * kLog2e;
  Forward state(smem, scale_log2, T);
  const Block<D, Order::kRowMajor> q_block(smem);
  copy_async_wait<1>();
  __syncthreads();
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int ks = 0; ks < D / 16; ++ks) load_matrix(state.q[b][ks], q_block(row0 + 16 * b, 2 * ks));
  }
  copy_async_wait<0>();
  __syncthreads();

  if constexpr (kWhole) {
    state.template keys<kTiles, true, true>(0);
  } else {
    int key0 = 0;
    for (; key0 + 8 * kTiles <= T; key0 += 8 * kTiles) state.template keys<kTiles, false, false>(key0);
    const int left = T - key0;
    if (left > 0 && left <= 16) state.template keys<2, false, true>(key0);
    if (left > 16 && left <= 32) state.template keys<4, false, true>(key0);
    if (kTiles > 4 && left > 32 && left <= 48) state.template keys<6, false, true>(key0);
    if (kTiles > 4 && left > 48) state.template keys<8, false, true>(key0);
  }

#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int row = row0 + 16 * b;
    if (row >= T) break;
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(state.sum[b][half]);
      factor[half] = 1.0f / sum;
      const int t = row + lane / 4 + 8 * half;
      if (lane % 4 == 0 && t < T)
        lse[blockIdx.x * static_cast<int64_t>(T) + t] = (state.max[b][half] * scale_log2 + log2f(sum)) * kLn2;
    }
    // Rows of Q that only this warp has read.
    store_rows<Half, D>(state.o[b], factor, smem + row * D * 2, out + (n * T + row) * width + head * D, width, T - row);
  }
}

}  // namespace maefast::cuda
