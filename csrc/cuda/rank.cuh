// The ranks of a row of noise, counted by one block with the row in shared memory.
#pragma once

#include "launch.h"

namespace maefast::cuda {

constexpr int kMostRanked = 2048;  // patches of a row; a sort is faster for more

struct Masking {
  const float* noise;    // [N, L]
  int64_t* ids_keep;     // [N, K]
  int64_t* ids_restore;  // [N, L]
  float* mask;           // [N, L]
  int L, K;
};

inline size_t rank_bytes(int L) { return divide_up(L, 4) * 4 * sizeof(int); }

// An integer that orders like the float: -0 equals +0, every NaN is the largest.
__device__ inline int order_key(float noise) {
  int bits;
  memcpy(&bits, &noise, sizeof(bits));
  const int magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7f800001;
  return bits < 0 ? -magnitude : magnitude;
}

// Calls found(i, rank) once for each patch of row n, by the threads of the block together; ties go
// by index. `keys` is shared memory of rank_bytes(L).
template <typename Found>
__device__ inline void rank_row(const float* noise, int64_t n, int L, int* keys, Found&& found) {
  const int padded = (L + 3) / 4 * 4, thread = threadIdx.x, threads = blockDim.x;
  for (int i = thread; i < padded; i += threads) keys[i] = i < L ? order_key(noise[n * L + i]) : 0x7fffffff;
  __syncthreads();
  for (int i = thread; i < L; i += threads) {
    const int key = keys[i];
    int rank = 0;
    // An earlier patch that ties comes first, so it counts where its key is below key + 1; keys
    // stop short of overflow.
    for (int j = 0; j < padded; j += 4) {
      const Pack<int, 4> others = load<4>(keys + j);
      for (int e = 0; e < 4; ++e) rank += others.value[e] < key + (j + e < i);
    }
    found(i, rank);
  }
}

__device__ inline void store_rank(const Masking& a, int64_t n, int i, int rank) {
  a.ids_restore[n * a.L + i] = rank;
  a.mask[n * a.L + i] = rank < a.K ? 0.0f : 1.0f;
  if (rank < a.K) a.ids_keep[n * a.K + rank] = i;
}

}  // namespace maefast::cuda
