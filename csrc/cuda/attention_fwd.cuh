// Forward pass: one CTA per sample and head, with Q, K and V of the head in shared memory. A warp
// takes blocks of warp_rows queries, one after the other. Keys are read in chunks with a running
// maximum and sum; a row that fits one chunk is never rescaled.
#pragma once

#include "attention_tiles.cuh"

namespace maefast::cuda {

struct ForwardArgs {
  const uint16_t* qkv;  // [N, T, 3*h*D]
  uint16_t* out;        // [N, T, h*D]
  float* lse;           // [N, h, T], natural logarithm
  int T, h, tasks;      // tasks: N * h
  float scale;
};

template <typename Element, typename Line>
struct ForwardState {
  static constexpr ForwardTile kTile = Line::kTile;
  static constexpr int D = kTile.head_width, kBlocks = kTile.warp_rows / kMmaRows, kTileBytes = kTile.tile_bytes();

  uint32_t q[kBlocks][D / 16][4];
  float o[kBlocks][D / 8][4];
  float max[kBlocks][2], sum[kBlocks][2];  // rows g and g + 8; sum is over this lane's keys
  float scale_log2;
  int T;
  uint32_t v_tile;
  Block<D, Order::kColMajor> k_block;
  Block<D, Order::kRowMajor> v_block;

  __device__ __forceinline__ ForwardState(uint32_t smem, float scale_log2, int T, int lane)
      : scale_log2(scale_log2), T(T), v_tile(smem + 2 * kTileBytes), k_block(smem + kTileBytes, lane), v_block(v_tile, lane) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      clear(o[b]);
      max[b][0] = max[b][1] = -INFINITY;
      sum[b][0] = sum[b][1] = 0.0f;
    }
  }

  // Adds a chunk of 8 * kFragments keys.
  template <int kFragments, bool kFirst, bool kMasked>
  __device__ __forceinline__ void keys(int key0) {
    float s[kBlocks][kFragments][4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) clear(s[b]);
#pragma unroll
    for (int i = 0; i + 1 < kFragments; i += 2) {
#pragma unroll
      for (int ks = 0; ks < D / 16; ++ks) {
        uint32_t k[4];
        ldmatrix_x4(k, k_block(key0 + 8 * i, 2 * ks));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          mma_m16n8k16<Element>(s[b][i], q[b][ks], k[0], k[1]);
          mma_m16n8k16<Element>(s[b][i + 1], q[b][ks], k[2], k[3]);
        }
      }
    }
    if constexpr (kFragments % 2) {
#pragma unroll
      for (int ks = 0; ks < D / 16; ++ks) {
        uint32_t k[2];
        ldmatrix_x2(k, k_block(key0 + 8 * (kFragments - 1), 2 * ks));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) mma_m16n8k16<Element>(s[b][kFragments - 1], q[b][ks], k[0], k[1]);
      }
    }
    constexpr int kSteps = (kFragments + 1) / 2;
    uint32_t p[kBlocks][kSteps][4];
    if constexpr (kMasked) mask(s, key0);
    softmax<kFragments, kFirst>(s);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        p[b][i / 2][i % 2 * 2] = Element::pack(s[b][i][0], s[b][i][1]);
        p[b][i / 2][i % 2 * 2 + 1] = Element::pack(s[b][i][2], s[b][i][3]);
      }
      if constexpr (kFragments % 2) p[b][kSteps - 1][2] = p[b][kSteps - 1][3] = 0;
    }
    // 128 scores of a row leave no registers for the addresses of V meanwhile.
    if constexpr (kBlocks * kTile.chunk >= 128) v_block = Block<D, Order::kRowMajor>(v_tile, thread_anew() % kWarp);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < D / 8; i += 2) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, v_block(key0 + 16 * step, i));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          mma_m16n8k16<Element>(o[b][i], p[b][step], v[0], v[1]);
          mma_m16n8k16<Element>(o[b][i + 1], p[b][step], v[2], v[3]);
        }
      }
    }
  }

 private:
  template <int kFragments>
  __device__ __forceinline__ void mask(float (&s)[kBlocks][kFragments][4], int key0) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      if (key0 + 8 * i + 8 <= T) continue;  // the same for the whole CTA
      const int key = key0 + 8 * i + threadIdx.x % 4 * 2;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (key >= T) s[b][i][0] = s[b][i][2] = -INFINITY;
        if (key + 1 >= T) s[b][i][1] = s[b][i][3] = -INFINITY;
      }
    }
  }

  // Replaces scores by exp2(scale_log2 * (s - max)). max is at most 8 / scale_log2 below the
  // maximum of its row: the sums are rescaled only when the maximum of any row of the warp has
  // grown by more. Each lane looks at its own keys; the lanes of a row exchange theirs only then.
  template <int kFragments, bool kFirst>
  __device__ __forceinline__ void softmax(float (&s)[kBlocks][kFragments][4]) {
    float top[kBlocks][2];
    bool grown = false;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[b][half] = s[b][0][2 * half];
#pragma unroll
        for (int i = 0; i < kFragments; ++i) top[b][half] = fmaxf(top[b][half], fmaxf(s[b][i][2 * half], s[b][i][2 * half + 1]));
        grown = grown || (top[b][half] - max[b][half]) * scale_log2 > 8.0f;
      }
    }
    if (kFirst || __any_sync(kAllLanes, grown)) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          top[b][half] = quad_max(top[b][half]);
          if constexpr (!kFirst) {
            top[b][half] = fmaxf(top[b][half], max[b][half]);
            const float shrink = ex2_approx((max[b][half] - top[b][half]) * scale_log2);
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
      for (int i = 0; i < kFragments; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[b][i][j] = ex2_approx(fmaf(s[b][i][j], scale_log2, -max[b][j / 2] * scale_log2));
          sum[b][j / 2] += s[b][i][j];
        }
      }
    }
  }
};

// grid N * h; with two stages as many CTAs as the GPU holds, each of which takes every gridDim.x-th
// head
template <typename Element, typename Line>
__global__ void __launch_bounds__(Line::kTile.threads, resident(Line::kTile, kMultiprocessorBytes))
    attention_fwd_kernel(ForwardArgs a) {
  constexpr ForwardTile kTile = Line::kTile;
  using State = ForwardState<Element, Line>;
  constexpr int D = State::D, kBlocks = State::kBlocks, kTileBytes = kTile.tile_bytes();
  const int T = a.T, width = a.h * D;
  const float scale_log2 = a.scale * kLog2e;
  // Every row that a warp reads is written in this launch, since a row past T can trigger the
  // rescaling of the others. Rows of Q past the tile are rows of K.
  const int rows = kTile.whole_row() ? kTile.tile_rows : min(kTile.blocks_for(T) * kTile.warp_rows, kTile.tile_rows);
  // Two groups of copies: Q and K, then V.
  const auto load = [&](int task, uint32_t smem, unsigned thread) {
    if (task < a.tasks) {
      const uint16_t* src = a.qkv + static_cast<int64_t>(task / a.h) * T * 3 * width + task % a.h * D;
      load_tiles<D, 2, kTileBytes>(smem, src, 3 * width, width, T, rows, thread);
      cp_async_commit_group();
      load_tiles<D, 1, kTileBytes>(smem + 2 * kTileBytes, src + 2 * width, 3 * width, width, T, rows, thread);
      cp_async_commit_group();
    } else {
      cp_async_commit_group();
      cp_async_commit_group();
    }
  };

  constexpr int kAhead = 2 * (kTile.stages - 1);  // groups of the next head
  uint32_t smem = shared_address(shared<uint4>()), next_smem = smem + 3 * kTileBytes;
  int task = blockIdx.x;
  load(task, smem, threadIdx.x);
  while (true) {
    // A CTA that takes several heads has no registers left: what follows from the thread's index is
    // computed again for each head.
    const unsigned thread = kTile.stages > 1 ? thread_anew() : threadIdx.x;
    const int lane = thread % kWarp;
    const int next = task + gridDim.x;
    if constexpr (kTile.stages > 1) load(next, next_smem, thread);
    cp_async_wait_group<(kTile.one_round() ? 1 : 0) + kAhead>();
    __syncthreads();
#pragma unroll 1
    for (int row0 = thread / kWarp * kTile.warp_rows; row0 < T; row0 += blockDim.x / kWarp * kTile.warp_rows) {
      State state(smem, scale_log2, T, lane);
      const Block<D, Order::kRowMajor> q_block(smem, lane);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int ks = 0; ks < D / 16; ++ks) ldmatrix_x4(state.q[b][ks], q_block(row0 + kMmaRows * b, 2 * ks));
      }
      if constexpr (kTile.one_round()) {
        cp_async_wait_group<kAhead>();
        __syncthreads();
      }

      if constexpr (kTile.whole_row()) {
        state.template keys<kTile.chunk / 8, true, true>(0);
      } else {
        int key0 = 0;
        for (; key0 + kTile.chunk <= T; key0 += kTile.chunk) state.template keys<kTile.chunk / 8, false, false>(key0);
        const int left = T - key0;
        if (left > 0 && left <= 16) state.template keys<2, false, true>(key0);
        if (left > 16 && left <= 32) state.template keys<4, false, true>(key0);
        if (kTile.chunk > 32 && left > 32 && left <= 48) state.template keys<6, false, true>(key0);
        if (kTile.chunk > 32 && left > 48) state.template keys<8, false, true>(key0);
      }

#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const int row = row0 + kMmaRows * b;
        if (row >= T) break;
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float sum = quad_sum(state.sum[b][half]);
          factor[half] = rcp_approx(sum);
          const int t = row + lane / 4 + 8 * half;
          if (lane % 4 == 0 && t < T)
            a.lse[task * static_cast<int64_t>(T) + t] = (state.max[b][half] * scale_log2 + lg2_approx(sum)) * kLn2;
        }
        // The rows of Q that stage the result are read by this warp only.
        uint16_t* dst = a.out + (static_cast<int64_t>(task / a.h) * T + row) * width + task % a.h * D;
        store_rows<Element, D>(state.o[b], factor, smem + row * D * 2, dst, width, T - row, lane);
      }
      if constexpr (kTile.one_round()) break;
    }
    if (kTile.stages == 1 || next >= a.tasks) return;
    __syncthreads();  // the tiles are free
    const uint32_t free = smem;
    smem = next_smem;
    next_smem = free;
    task = next;
  }
}

}  // namespace maefast::cuda
