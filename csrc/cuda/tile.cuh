// Tiles of 2-byte values in shared memory, and the moves between them, registers and global memory.
#pragma once

#include "launch.h"
#include "mma.cuh"

namespace maefast::cuda {

constexpr int kMmaRows = 16;  // of an accumulator
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rows of kWidth values. The 16-byte chunks of a row are permuted so that eight consecutive rows of
// one chunk column lie in eight different groups of banks: ldmatrix and stmatrix then have no
// conflicts, whatever the width, and rows need no padding.
template <int kWidth>
struct Tile {
  static_assert(kWidth % 16 == 0);
  static constexpr int kChunks = kWidth / 8, kStride = kWidth * 2;
  static constexpr int kMask = kChunks % 8 == 0 ? 7 : kChunks % 8 == 4 ? 3 : 1;
  static constexpr int kShift = kChunks % 8 == 0 ? 0 : kChunks % 8 == 4 ? 1 : 2;

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kStride + ((chunk ^ (row >> kShift & kMask)) << 4);
  }
};

// The address that this lane gives to ldmatrix or stmatrix for a block of 16 rows and 2 chunks.
// kRowMajor has the four matrices in the order of an A fragment of the block (rows first),
// kColMajor in the order of two B fragments with n along the rows; with .trans they swap roles:
// kRowMajor gives two B fragments with k along the rows, kColMajor the A fragment of the transpose.
enum class Order { kRowMajor, kColMajor };

template <int kWidth, Order kOrder>
__device__ __forceinline__ uint32_t block_address(uint32_t tile, int chunk, int lane = threadIdx.x % kWarp) {
  const int row = kOrder == Order::kRowMajor ? lane % 16 : lane % 8 + lane / 16 * 8;
  return tile + Tile<kWidth>::offset(row, chunk + (kOrder == Order::kRowMajor ? lane / 16 : lane / 8 % 2));
}

// The addresses of block_address for rows from a multiple of 8 on and even chunks known at compile
// time.
template <int kWidth, Order kOrder>
class Block {
  static constexpr int kMask = Tile<kWidth>::kMask;
  uint32_t at_[(kMask + 1) / 2];

 public:
  __device__ __forceinline__ explicit Block(uint32_t tile, int lane = threadIdx.x % kWarp) {
#pragma unroll
    for (int i = 0; i < (kMask + 1) / 2; ++i) at_[i] = block_address<kWidth, kOrder>(tile, 2 * i, lane);
  }
  __device__ __forceinline__ uint32_t operator()(int row, int chunk) const {
    return at_[(chunk & kMask) / 2] + row * Tile<kWidth>::kStride + ((chunk & ~kMask) << 4);
  }
  __device__ __forceinline__ void advance(int rows) {
#pragma unroll
    for (int i = 0; i < (kMask + 1) / 2; ++i) at_[i] += rows * Tile<kWidth>::kStride;
  }
};

// Starts copying rows [0, rows) of kTensors tensors, `apart` values apart, into tiles kTileBytes
// apart; rows from T on become zeros.
template <int D, int kTensors, int kTileBytes>
__device__ __forceinline__ void load_tiles(uint32_t tile, const uint16_t* src, int row_stride, int apart, int T, int rows,
                                           unsigned thread = threadIdx.x) {
  constexpr int kChunks = Tile<D>::kChunks;
  for (int i = thread; i < rows * kChunks; i += blockDim.x) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid = row < T;
    const uint16_t* from = src + (valid ? row * row_stride + chunk * 8 : 0);
    const uint32_t to = tile + Tile<D>::offset(row, chunk);
#pragma unroll
    for (int k = 0; k < kTensors; ++k) cp_async(to + k * kTileBytes, from + k * apart, valid);
  }
}

template <int kFragments>
__device__ __forceinline__ void clear(float (&acc)[kFragments][4]) {
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
  }
}

// Writes the first `valid` rows of factor * acc, 16 rows of D, to global memory through 16 rows of
// a tile that no other warp uses. The tile then holds these rows, and zeros past them.
template <typename Element, int D>
__device__ __forceinline__ void store_rows(const float (&acc)[D / 8][4], const float (&factor)[2], uint32_t stage, uint16_t* dst,
                                           int row_stride, int valid, int lane = threadIdx.x % kWarp) {
  const int group = lane / 4;
  const Block<D, Order::kRowMajor> block(stage, lane);
#pragma unroll
  for (int i = 0; i < D / 8; i += 2) {
    uint32_t r[4] = {Element::pack(acc[i][0] * factor[0], acc[i][1] * factor[0]),
                     Element::pack(acc[i][2] * factor[1], acc[i][3] * factor[1]),
                     Element::pack(acc[i + 1][0] * factor[0], acc[i + 1][1] * factor[0]),
                     Element::pack(acc[i + 1][2] * factor[1], acc[i + 1][3] * factor[1])};
    if (group >= valid) r[0] = r[2] = 0;
    if (group + 8 >= valid) r[1] = r[3] = 0;
    stmatrix_x4(block(0, i), r);
  }
  __syncwarp();
  constexpr int kChunks = Tile<D>::kChunks;
#pragma unroll
  for (int turn = 0; turn < kMmaRows * kChunks / kWarp; ++turn) {
    const int i = lane + turn * kWarp, row = i / kChunks, chunk = i % kChunks;
    const uint4 v = ld_shared_v4(stage + Tile<D>::offset(row, chunk));
    // A plain store of a uint4 becomes four of 4 bytes; test-aot holds that this one does not.
    if (row < valid) __stcg(reinterpret_cast<uint4*>(dst + row * row_stride + chunk * 8), v);
  }
  __syncwarp();
}

// Sums the columns of rows of D in one warp's shared memory, 16 rows at a time, by a product with
// ones. Lane (g, t) keeps columns 8 (g + 8 j) + 2 t and the one after it.
template <typename Element, int D>
class ColumnSums {
  static constexpr int kKept = (D + 63) / 64;
  int lane_;
  float kept_[kKept][2];

 public:
  __device__ __forceinline__ explicit ColumnSums(int lane = threadIdx.x % kWarp) : lane_(lane) {
#pragma unroll
    for (int j = 0; j < kKept; ++j) kept_[j][0] = kept_[j][1] = 0.0f;
  }
  __device__ __forceinline__ void add(uint32_t rows) {
    const int group = lane_ / 4;
    const Block<D, Order::kRowMajor> block(rows, lane_);
    const uint32_t one = Element::pack(1.0f, 1.0f), ones[4] = {one, one, one, one};
#pragma unroll
    for (int i = 0; i < D / 8; i += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, block(0, i));
      float sums[2][4];
      clear(sums);
      mma_m16n8k16<Element>(sums[0], ones, b[0], b[1]);
      mma_m16n8k16<Element>(sums[1], ones, b[2], b[3]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const bool mine = group == (i + k) % 8;
        kept_[(i + k) / 8][0] += mine ? sums[k][0] : 0.0f;
        kept_[(i + k) / 8][1] += mine ? sums[k][1] : 0.0f;
      }
    }
  }
  // Writes the sums to shared memory; address(column) is contiguous over four columns.
  template <typename Address>
  __device__ __forceinline__ void store(const Address& address) const {
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int column = 8 * (lane_ / 4 + 8 * j) + lane_ % 4 * 2;
      if (column < D) st_shared_v2(address(column), kept_[j]);
    }
  }
};

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

}  // namespace maefast::cuda
