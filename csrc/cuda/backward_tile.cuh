// What the two backward kernels of attention share: a line of attention_tiles.inc, and their arguments.
#pragma once

#include "tile.cuh"

namespace maefast::cuda {

struct BackwardTile {
  int head_width, tokens;
  bool rowwise;
  int warp_rows, tile_rows, chunk;
  bool keep_k = false, keep_v = false, prefetch = false;
  int threads, per_sm, shared;

  __host__ __device__ constexpr int threads_for(int T) const {
    return rowwise ? threads : (T + warp_rows - 1) / warp_rows * kWarp;
  }
  __host__ __device__ constexpr int warps() const { return threads / kWarp; }
  __host__ __device__ constexpr int tile_bytes() const { return tile_rows * head_width * 2; }
  // dS (queries, keys) of the whole row; else (keys of all warps, queries of a chunk)
  __host__ __device__ constexpr int score_bytes() const {
    return 2 * (rowwise ? tile_rows * tile_rows : warps() * warp_rows * chunk);
  }
  __host__ __device__ constexpr int stats_bytes() const { return rowwise ? 0 : tile_rows * 4 * 4; }
  __host__ __device__ constexpr int stage_bytes() const { return rowwise || keep_v ? 0 : warps() * kMmaRows * head_width * 2; }
  __host__ __device__ constexpr bool is_consistent() const {
    const int fits = rowwise
                         ? tile_rows == warps() * warp_rows && chunk >= tokens && chunk % 8 == 0
                         : chunk / kMmaRows % 2 == 1 && chunk % kMmaRows == 0;  // the swizzle of dS must not depend on the block
    return fits && shared == 4 * tile_bytes() + (rowwise ? 2 : 1) * score_bytes() + stats_bytes() + stage_bytes() &&
           threads % kWarp == 0 && warps() * warp_rows >= tokens && tile_rows >= tokens && warp_rows % kMmaRows == 0 &&
           (!rowwise || warp_rows == kMmaRows);
  }
};

struct BackwardArgs {
  const uint16_t *qkv, *out;  // [N, T, 3*h*D] and [N, T, h*D]
  const float* lse;           // [N, h, T]
  const uint16_t* dout;       // [N, T, h*D]
  uint16_t* dqkv;             // [N, T, 3*h*D]
  int T, h;
  float scale;
};

}  // namespace maefast::cuda
