// Tensors (..., D) as rows of D values, and loops over one row: whole vectors, then what is left of
// it as the first lanes of one.
#pragma once

#include "vec.h"

namespace maefast::cpu {

struct Rows {
  const void* data;  // the values of a row are dense
  DType dtype;
  int64_t stride;  // from row to row, in values
};

namespace MAEFAST_ISA {
namespace {

template <typename T>
inline const T* row_of(const Rows& rows, int64_t i) {
  return static_cast<const T*>(rows.data) + i * rows.stride;
}

// Prefetches the same columns of the next row into L2: hardware prefetching ends with each page and
// starts again slowly. The address may lie past the last row; a prefetch does not fault.
template <typename T>
inline void prefetch(const T* p, int64_t stride) {
  __builtin_prefetch(p + stride, 0, 2);
}

// A vector of which every lane belongs to the row.
struct Whole {
  template <typename T>
  Vec load(const T* p) const {
    return MAEFAST_ISA::load(p);
  }
  template <typename T>
  void store(T* p, Vec v) const {
    MAEFAST_ISA::store(p, v);
  }
#ifdef MAEFAST_ISA_avx512bf16
  // One instruction where store() takes eight; it takes subnormal values for zero.
  void store(bf16* p, Vec v) const {
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    std::memcpy(p, &rounded, sizeof rounded);
  }
#endif
  Vec keep(Vec v) const { return v; }
};

// The end of a row: n < kLanes lanes.
struct First {
  int64_t n;

  template <typename T>
  Vec load(const T* p) const {
    return load_first(p, n);
  }
  template <typename T>
  void store(T* p, Vec v) const {
    store_first(p, v, n);
  }
  // Returns v with zeros in the lanes that are not the row's.
  Vec keep(Vec v) const {
    VecI lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane < static_cast<int32_t>(n) ? v : Vec{};
  }
};

// Calls body(part, i) for each vector of a row of n values; it starts at value i.
template <typename Body>
inline void for_row(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(Whole{}, i);
  if (i < n) body(First{n - i}, i);
}

template <int N>
struct Sums {
  float of[N];
};

// N sums over a row, to which body(part, i, totals) adds the terms of one vector. Their order
// depends on n alone.
template <int N, typename Body>
inline Sums<N> sum_row(int64_t n, Body body) {
  constexpr int kChains = 4;  // independent additions, to hide their latency
  constexpr int64_t kStep = kChains * kLanes;
  constexpr int64_t kRun = 32 * kStep;  // values; short chains of sums round better
  Vec totals[kChains][N] = {}, done[N] = {};
  int64_t i = 0;
  for (int64_t run = kRun; i + kStep <= n; run += kRun) {
    for (; i < run && i + kStep <= n; i += kStep) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) body(Whole{}, i + chain * kLanes, totals[chain]);
    }
    for (int s = 0; s < N; ++s) {
      done[s] += (totals[0][s] + totals[1][s]) + (totals[2][s] + totals[3][s]);
      for (int chain = 0; chain < kChains; ++chain) totals[chain][s] = Vec{};
    }
  }
  for (; i + kLanes <= n; i += kLanes) body(Whole{}, i, totals[0]);
  if (i < n) body(First{n - i}, i, totals[0]);
  Sums<N> sums;
  for (int s = 0; s < N; ++s) sums.of[s] = sum(done[s] + totals[0][s]);
  return sums;
}

}  // namespace
}  // namespace MAEFAST_ISA
}  // namespace maefast::cpu
