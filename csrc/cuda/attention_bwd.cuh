// What the two backward kernels of attention share.
#pragma once

#include "attention_tiles.cuh"

namespace maefast::cuda {

struct BackwardArgs {
  const uint16_t *qkv, *out;  // [N, T, 3*h*D] and [N, T, h*D]
  const float* lse;           // [N, h, T]
  const uint16_t* dout;       // [N, T, h*D]
  uint16_t* dqkv;             // [N, T, 3*h*D]
  float* sums;                // [N, 3*h*D] of the columns of dqkv over the tokens of a sample, or null
  int T, h, ahead;            // ahead: distance from a CTA to the next one on its SM
  float scale, scale_log2;    // 1 / sqrt(D), and that times log2(e)
};

// Prefetches the rows that the CTA of head `task` will read, 64 bytes at a time.
template <int D>
__device__ __forceinline__ void prefetch_rows(const BackwardArgs& a, int64_t task, bool with_out) {
  constexpr int kParts = (D * 2 + 63) / 64;
  const int width = a.h * D, tensors = with_out ? 5 : 4;
  const int64_t row0 = task / a.h * a.T, at = task % a.h * D;
  for (int i = threadIdx.x; i < a.T * kParts; i += blockDim.x) {
    const int64_t row = row0 + i / kParts;
    const int part = i % kParts * 32;
    for (int k = 0; k < tensors; ++k) {
      const uint16_t* from = k < 3 ? a.qkv + (3 * row + k) * width : (k == 3 ? a.dout : a.out) + row * width;
      prefetch_l2(from + at + part);
    }
  }
}

// Adds the partial sums of the columns of dQ, dK and dV (k = 0, 1, 2) and writes the totals. There
// are parts(k) partial sums of a column; partial(k, column, i) is the address in shared memory of
// the i-th of them, followed by those of the next three columns.
template <int D, typename Parts, typename Partial>
__device__ __forceinline__ void store_sums(const BackwardArgs& a, const Parts& parts, const Partial& partial) {
  const int64_t n = blockIdx.x / a.h;
  const int head = blockIdx.x % a.h, width = a.h * D;
  for (int i = threadIdx.x * 4; i < 3 * D; i += blockDim.x * 4) {
    const int k = i / D, column = i % D;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int part = 0; part < parts(k); ++part) {
      float v[4];
      ld_shared_v4(v, partial(k, column, part));
      sum = make_float4(sum.x + v[0], sum.y + v[1], sum.z + v[2], sum.w + v[3]);
    }
    __stcg(reinterpret_cast<float4*>(a.sums + n * 3 * width + k * width + head * D + column), sum);
  }
}

}  // namespace maefast::cuda
