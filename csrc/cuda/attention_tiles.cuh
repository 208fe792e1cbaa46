// The lines of attention_tiles.inc. A kernel takes a line as a type, Forward<i> or Backward<i>:
// nvcc 13 does not compile kernels whose template argument is a value of a struct.
#pragma once

#include "tile.cuh"

namespace maefast::cuda {

// Bytes of shared memory of a multiprocessor. Each CTA takes kReservedBytes in addition to its own.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr int kMultiprocessorBytes = 228 << 10;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr int kMultiprocessorBytes = 164 << 10;
#else
constexpr int kMultiprocessorBytes = 100 << 10;
#endif
constexpr int kReservedBytes = 1 << 10;

// CTAs of a tile that share a multiprocessor: per_sm, or fewer where its shared memory is smaller.
// A CTA may then have more registers.
template <typename Tile>
__host__ __device__ constexpr int resident(const Tile& tile, int shared_bytes) {
  const int fit = shared_bytes / (tile.shared + kReservedBytes);
  return fit < 1 ? 1 : fit < tile.per_sm ? fit : tile.per_sm;
}

struct ForwardTile {
  static constexpr bool prefetch = false;
  int head_width, tokens, warp_rows, tile_rows, chunk, stages, threads, per_sm, shared;

  __host__ __device__ constexpr int blocks_for(int T) const { return (T + warp_rows - 1) / warp_rows; }
  __host__ __device__ constexpr int threads_for(int T) const {
    return blocks_for(T) * kWarp < threads ? blocks_for(T) * kWarp : threads;
  }
  __host__ __device__ constexpr int tile_bytes() const { return tile_rows * head_width * 2; }
  __host__ __device__ constexpr bool whole_row() const { return chunk >= tokens; }
  // whether no warp takes a second block of queries
  __host__ __device__ constexpr bool one_round() const { return blocks_for(tokens) * kWarp <= threads; }
  constexpr bool is_consistent() const {
    return shared == stages * 3 * tile_bytes() && threads % kWarp == 0 && tile_rows >= tokens && warp_rows % kMmaRows == 0 &&
           chunk % 8 == 0 && (whole_row() || chunk == 32 || chunk == 64);
  }
};

struct BackwardTile {
  static constexpr int stages = 1;
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
  constexpr bool is_consistent() const {
    // the swizzle of dS must not depend on the block of queries
    const bool fits = rowwise ? tile_rows == warps() * warp_rows && warp_rows == kMmaRows && chunk >= tokens && chunk % 8 == 0
                              : chunk % kMmaRows == 0 && chunk / kMmaRows % 2 == 1;
    return fits && shared == 4 * tile_bytes() + (rowwise ? 2 : 1) * score_bytes() + stats_bytes() + stage_bytes() &&
           threads % kWarp == 0 && warps() * warp_rows >= tokens && tile_rows >= tokens && warp_rows % kMmaRows == 0;
  }
};

inline constexpr ForwardTile kForwardTiles[] = {
#define FORWARD(...) {__VA_ARGS__},
#define BACKWARD(...)
#include "../../maefast/attention_tiles.inc"
};
inline constexpr BackwardTile kBackwardTiles[] = {
#define FORWARD(...)
#define BACKWARD(...) {__VA_ARGS__},
#include "../../maefast/attention_tiles.inc"
};

template <int kLine>
struct Forward {
  static constexpr ForwardTile kTile = kForwardTiles[kLine];
  static_assert(kTile.is_consistent());
};

template <int kLine>
struct Backward {
  static constexpr BackwardTile kTile = kBackwardTiles[kLine];
  static_assert(kTile.is_consistent());
};

}  // namespace maefast::cuda
