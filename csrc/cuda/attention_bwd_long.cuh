// Backward pass for long rows: one CTA per sample and head, one warp per 16 * kBlocks keys. A warp
// keeps dK and dV of its keys in registers. All warps walk over the queries together. After each
// kChunk blocks of 16 queries, shared memory holds dS (keys, queries) of all warps, and each warp
// sums dQ of one block over all keys. The scores are computed once; delta comes from O.
#pragma once

#include "attention_bwd.cuh"

namespace maefast::cuda {

template <typename Element>
__device__ __forceinline__ float dot8(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = Element::unpack(x[i]), v = Element::unpack(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

// 16 * kBlocks rows of K or V as A fragments, from row kRow0 of a block on. They are kept in
// registers, or loaded for each use.
template <int D, int kBlocks, int kRow0, bool kKeep>
class Rows {
  using Address = Block<D, Order::kRowMajor>;
  uint32_t kept_[kKeep ? kBlocks : 1][D / 16][4] = {};

 public:
  __device__ __forceinline__ explicit Rows(const Address& block) {
    if constexpr (kKeep) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int ks = 0; ks < D / 16; ++ks) ldmatrix_x4(kept_[b][ks], block(kRow0 + 16 * b, 2 * ks));
      }
    }
  }
  __device__ __forceinline__ void get(uint32_t (&a)[4], const Address& block, int b, int ks) const {
    if constexpr (kKeep) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept_[b][ks][i];
    } else {
      ldmatrix_x4(a, block(kRow0 + 16 * b, 2 * ks));
    }
  }
};

// out[b] (16 keys, 16 queries) = keys (16 * kBlocks, D) * rows [row0, row0 + 16) of a tile
// (queries, D)^T + start (per query)
template <typename Element, int D, int kBlocks, typename Keys>
__device__ __forceinline__ void key_scores(float (&out)[kBlocks][2][4], const Keys& keys,
                                           const Block<D, Order::kRowMajor>& key_block, const Block<D, Order::kColMajor>& block,
                                           int row0, uint32_t start) {
  float first[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) ld_shared_v4(first[i], start + 64 * i);
#pragma unroll
  for (int ks = 0; ks < D / 16; ++ks) {
    uint32_t q[4];
    ldmatrix_x4(q, block(row0, 2 * ks));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      uint32_t a[4];
      keys.get(a, key_block, b, ks);
#pragma unroll
      for (int i = 0; i < 2; ++i) Element::mma_m16n8k16(out[b][i], a, q[2 * i], q[2 * i + 1], ks == 0 ? first[i] : out[b][i]);
    }
  }
}

// acc[b] (16 keys, D) += a[b] (16 keys, 16 queries) * rows [row0, row0 + 16) of a tile (queries, D)
template <typename Element, int D, int kBlocks>
__device__ __forceinline__ void accumulate(float (&acc)[kBlocks][D / 8][4], const uint32_t (&a)[kBlocks][4],
                                           const Block<D, Order::kRowMajor>& block, int row0) {
#pragma unroll
  for (int i = 0; i < D / 8; i += 2) {
    uint32_t r[4];
    ldmatrix_x4_trans(r, block(row0, i));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      mma_m16n8k16<Element>(acc[b][i], a[b], r[0], r[1]);
      mma_m16n8k16<Element>(acc[b][i + 1], a[b], r[2], r[3]);
    }
  }
}

// grid N * h, 32 * ceil(T / warp_rows) threads
template <typename Element, typename Line>
__global__ void __launch_bounds__(Line::kTile.threads, resident(Line::kTile, kMultiprocessorBytes))
    attention_bwd_long_kernel(BackwardArgs a) {
  constexpr BackwardTile kTile = Line::kTile;
  constexpr int D = kTile.head_width, kBlocks = kTile.warp_rows / kMmaRows, kRows = kTile.tile_rows,
                kChunk = kTile.chunk / kMmaRows, kTileBytes = kTile.tile_bytes();
  // Q, K, V, dO, dS, the initial values of P and dS, and 16 rows for the results of each warp
  const uint32_t q_tile = shared_address(shared<uint4>()), v_tile = q_tile + 2 * kTileBytes, do_tile = v_tile + kTileBytes,
                 ds_tile = do_tile + kTileBytes, stats = ds_tile + kTile.score_bytes();
  const int64_t n = blockIdx.x / a.h;
  const int T = a.T, head = blockIdx.x % a.h, width = a.h * D;
  const int blocks = (T + 15) / 16, rows = blocks * 16;

  load_tiles<D, 3, kTileBytes>(q_tile, a.qkv + n * T * 3 * width + head * D, 3 * width, width, T, rows);
  load_tiles<D, 1, kTileBytes>(do_tile, a.dout + n * T * width + head * D, width, width, T, rows);
  cp_async_commit_group();

  if constexpr (kTile.prefetch) {
    if (blockIdx.x + a.ahead < gridDim.x) prefetch_rows<D>(a, blockIdx.x + a.ahead, true);
  }

  // The initial values of the scores and of dP, for each pair of queries in the order of an
  // accumulator: (q, q + 1, q, q + 1). kPerRow threads share a row.
  constexpr int kChunks = D / 8, kPerRow = kChunks % 4 ? 2 : kChunks, kTurns = kBlocks * kPerRow / 2;
  uint4 o[kTurns][kChunks / kPerRow];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = threadIdx.x + turn * blockDim.x, row = i / kPerRow;
#pragma unroll
    for (int c = 0; c < kChunks / kPerRow; ++c) {
      o[turn][c] = make_uint4(0, 0, 0, 0);
      if (row < T)
        o[turn][c] = *reinterpret_cast<const uint4*>(a.out + (n * T + row) * width + head * D + (i % kPerRow + c * kPerRow) * 8);
    }
  }
  cp_async_wait_group<0>();
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = threadIdx.x + turn * blockDim.x, row = i / kPerRow;
    if (row >= rows) break;  // the same for a whole warp: 16 * kPerRow is a multiple of 32
    float delta = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks / kPerRow; ++c)
      delta += dot8<Element>(o[turn][c], ld_shared_v4(do_tile + Tile<D>::offset(row, i % kPerRow + c * kPerRow)));
#pragma unroll
    for (int step = 1; step < kPerRow; step *= 2) delta += __shfl_xor_sync(kAllLanes, delta, step);
    if (i % kPerRow == 0) {
      // P = exp2(scale_log2 * (s + start)), and 0 past T.
      const float start = row < T ? a.lse[blockIdx.x * static_cast<int64_t>(T) + row] / -a.scale : -INFINITY;
      const uint32_t at = stats + row / 2 * 16 + row % 2 * 4;
      st_shared(at, start);
      st_shared(at + 8, start);
      st_shared(at + kRows * 8, -delta);
      st_shared(at + kRows * 8 + 8, -delta);
    }
  }

  // The tiles are adjacent: row r of K is row kRows + r of Q.
  constexpr int kK = kRows, kV = 2 * kRows, kDo = 3 * kRows, kStride = Tile<D>::kStride;
  const auto key_block = [&](unsigned thread) {
    return Block<D, Order::kRowMajor>(q_tile + thread / kWarp * kTile.warp_rows * kStride, thread % kWarp);
  };
  const Rows<D, kBlocks, kK, kTile.keep_k> k(key_block(threadIdx.x));
  const Rows<D, kBlocks, kV, kTile.keep_v> v(key_block(threadIdx.x));
  float dk[kBlocks][D / 8][4], dv[kBlocks][D / 8][4];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    clear(dk[b]);
    clear(dv[b]);
  }
  __syncthreads();

  constexpr int kScoreStride = Tile<kChunk * 16>::kStride;
  constexpr bool kOneChunk = kTile.chunk >= kTile.tokens;
  const auto rows_of = [&](int row) { return a.dqkv + (n * T + row) * 3 * width + head * D; };
  // Rows of V that only this warp reads are free once it has them in registers.
  const uint32_t stages = kTile.keep_v ? v_tile : stats + kTile.stats_bytes();
  constexpr int kStageBytes = (kTile.keep_v ? kTile.warp_rows : kMmaRows) * D * 2;
  const float one[2] = {1.0f, 1.0f}, scales[2] = {a.scale, a.scale};
  // The sums of 16 rows of dQ replace the initial values of those queries.
  static_assert(D <= 64);
  const auto dq_sums_at = [&](int block, int column) { return stats + block * 128 + column / 32 * kRows * 8 + column % 32 * 4; };

  // dK and dV fill the registers, so what follows from the thread's index is computed again for
  // each chunk.
#pragma unroll 1
  for (int first = 0; first < blocks; first += kChunk) {
    const int count = kOneChunk ? blocks : min(kChunk, blocks - first);
    {
      const unsigned thread = thread_anew();
      const int lane = thread % kWarp, row0 = thread / kWarp * kTile.warp_rows;
      const int left = T - row0 - lane / 4;
      const auto keys = key_block(thread);
      Block<D, Order::kRowMajor> row_block(q_tile + first * 16 * kStride, lane);
      Block<D, Order::kColMajor> col_block(q_tile + first * 16 * kStride, lane);
      uint32_t ds_store = block_address<kChunk * 16, Order::kRowMajor>(ds_tile, 0, lane) + row0 * kScoreStride;
      uint32_t start = stats + first * 128 + lane % 4 * 16;
#pragma unroll 1
      for (const uint32_t end = start + count * 128; start != end; start += 128) {
        float s[kBlocks][2][4];
        uint32_t p[kBlocks][4], ds[kBlocks][4];  // A fragments: P in fp32 would not fit the registers
        key_scores<Element, D>(s, k, keys, col_block, 0, start);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float (&c)[4] = s[b][i / 2];
            p[b][i] = Element::pack(ex2_approx(c[i % 2 * 2] * a.scale_log2), ex2_approx(c[i % 2 * 2 + 1] * a.scale_log2));
          }
        }
        accumulate<Element, D>(dv, p, row_block, kDo);
        key_scores<Element, D>(s, v, keys, col_block, kDo, start + kRows * 8);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float (&c)[4] = s[b][i / 2];
            const float2 weight = Element::unpack(p[b][i]);
            ds[b][i] = Element::pack(weight.x * c[i % 2 * 2], weight.y * c[i % 2 * 2 + 1]);
            if (left <= 16 * b + i % 2 * 8) ds[b][i] = 0;  // a key past T: its weight is not bounded
          }
          stmatrix_x4(ds_store + 16 * b * kScoreStride, ds[b]);
        }
        accumulate<Element, D>(dk, ds, row_block, 0);
        row_block.advance(16);
        col_block.advance(16);
        ds_store += 32;
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int block = thread_anew() / kWarp; block < count; block += blockDim.x / kWarp) {
      const unsigned thread = thread_anew();
      const int lane = thread % kWarp;
      const uint32_t stage = stages + thread / kWarp * kStageBytes;
      Block<D, Order::kRowMajor> k_block(q_tile + kTileBytes, lane);
      uint32_t ds_load = block_address<kChunk * 16, Order::kColMajor>(ds_tile, 0, lane) + block * 32;
      float dq[1][D / 8][4];
      clear(dq[0]);
#pragma unroll 1
      for (const uint32_t end = ds_load + rows * kScoreStride; ds_load != end; ds_load += 16 * kScoreStride) {
        uint32_t a[1][4];
        ldmatrix_x4_trans(a[0], ds_load);
        accumulate<Element, D>(dq, a, k_block, 0);
        k_block.advance(16);
      }
      const int row = 16 * (first + block);
      store_rows<Element, D>(dq[0], scales, stage, rows_of(row), 3 * width, T - row, thread_anew() % kWarp);
      if (a.sums) {
        ColumnSums<Element, D> sums(thread_anew() % kWarp);
        sums.add(stage);
        sums.store([&](int column) { return dq_sums_at(first + block, column); });
      }
    }
    if (kOneChunk) break;
    if (first + count < blocks) __syncthreads();
  }
  const unsigned thread = thread_anew();
  const int lane = thread % kWarp, row0 = thread / kWarp * kTile.warp_rows;
  const uint32_t stage = stages + thread / kWarp * kStageBytes;
  ColumnSums<Element, D> dk_sums(lane), dv_sums(lane);
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int row = row0 + 16 * b;
    if (row >= T) break;
    store_rows<Element, D>(dv[b], one, stage, rows_of(row) + 2 * width, 3 * width, T - row, lane);
    if (a.sums) dv_sums.add(stage);
    store_rows<Element, D>(dk[b], scales, stage, rows_of(row) + width, 3 * width, T - row, lane);
    if (a.sums) dk_sums.add(stage);
  }
  if (a.sums == nullptr) return;
  __syncwarp();
  dk_sums.store([&](int column) { return stage + column * 4; });
  dv_sums.store([&](int column) { return stage + (D + column) * 4; });
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  store_sums<D>(
      a, [&](int k) { return k == 0 ? blocks : warps; },
      [&](int k, int column, int i) {
        return k == 0 ? dq_sums_at(i, column) : stages + i * kStageBytes + ((k - 1) * D + column) * 4;
      });
}

}  // namespace maefast::cuda
