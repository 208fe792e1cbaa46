// Matrix products on 32-bit words, under the names of BLIS. A word is an fp32 value or, with
// kPairs, two bf16 values that are neighbours along K, on CPUs that multiply such pairs.
#pragma once

#include "vec.h"

namespace maefast::cpu::MAEFAST_ISA {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// C[M][N] (+)= A[M][K] B[K][N], all in words: element (i, k) of A is at i * rs_a + k * cs_a, the
// rows of B and C are dense.
struct Product {
  const float* a;
  int64_t rs_a, cs_a;
  const float* b;
  int64_t rs_b;
  float* c;
  int64_t rs_c;
  int64_t k;
  bool accumulate = false;
};

template <bool kPairs>
MAEFAST_INLINE Vec multiply_add(const float* a, Vec b, Vec c) {
#ifdef __AVX512BF16__
  if constexpr (kPairs) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)), reinterpret_cast<__m512bh>(b)));
  }
#endif
  return c + *a * b;
}

// Calls f with 0 .. kCount-1 as constants: the compiler keeps an array in registers only if no loop
// over it is left.
template <int kCount, typename F, int... kIndex>
__attribute__((always_inline)) inline void unrolled(F f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}

template <int kCount, typename F>
__attribute__((always_inline)) inline void unrolled(F f) {
  unrolled<kCount>(f, std::make_integer_sequence<int, kCount>{});
}

// Computes the micro-tile MR x NR of C at (i, j), its sums in registers.
template <bool kPairs, int MR, int NR>
void micro_kernel(const Product& p, int64_t i, int64_t j) {
  constexpr int kVectors = NR / kLanes;
  const float *a = p.a + i * p.rs_a, *b = p.b + j;
  const int64_t rs_a = p.rs_a, cs_a = p.cs_a, rs_b = p.rs_b, rs_c = p.rs_c;
  float* c = p.c + i * rs_c + j;
  Vec sums[MR][kVectors] = {};
  for (int64_t k = p.k; k > 0; --k, a += cs_a, b += rs_b) {
    Vec b_row[kVectors];
    unrolled<kVectors>([&](auto v) { b_row[v] = load(b + v * kLanes); });
    unrolled<MR>([&](auto r) {
      unrolled<kVectors>([&](auto v) { sums[r][v] = multiply_add<kPairs>(a + r * rs_a, b_row[v], sums[r][v]); });
    });
  }
  unrolled<MR>([&](auto r) {
    unrolled<kVectors>([&](auto v) {
      float* to = c + r * rs_c + v * kLanes;
      store(to, p.accumulate ? load(to) + sums[r][v] : sums[r][v]);
    });
  });
}

// Micro-tiles MR x NR that fill the registers:
//   AVX-512  12 x 16, 12 x 32, 8 x 48, 6 x 64
//   AVX2     6 x 8, 6 x 16, 4 x 24
//   scalar   4 x 1
constexpr int kMaxNR = kLanes == 16 ? 64 : kLanes == 8 ? 24 : 1;
constexpr int choose_mr(int NR) { return kLanes == 16 ? (NR <= 32 ? 12 : 384 / NR) : kLanes == 8 ? (NR <= 16 ? 6 : 4) : 4; }

// The last m <= MR rows of a micro-panel.
template <bool kPairs, int MR, int NR>
inline void multiply_edge(const Product& p, int64_t i, int64_t j, int64_t m) {
  if constexpr (MR > 0) {
    if (m == MR) return micro_kernel<kPairs, MR, NR>(p, i, j);
    multiply_edge<kPairs, MR - 1, NR>(p, i, j, m);
  }
}

// Leaves micro-tiles of C as they are.
struct NoEpilogue {
  void prefetch(int64_t, int64_t, int64_t, int64_t) const {}
  void store(int64_t, int64_t, int64_t, int64_t) const {}
};

// The m rows of C at the micro-panel of B that starts at column j.
template <bool kPairs, int NR, typename Epilogue>
void multiply_micro_panel(const Product& p, int64_t m, int64_t j, const Epilogue& epilogue) {
  constexpr int MR = choose_mr(NR), kVectors = NR / kLanes;
  int64_t i = 0;
  for (; i + MR <= m; i += MR) {
    epilogue.prefetch(i, MR, j, kVectors);
    micro_kernel<kPairs, MR, NR>(p, i, j);
    epilogue.store(i, MR, j, kVectors);
  }
  if (i == m) return;
  epilogue.prefetch(i, m - i, j, kVectors);
  multiply_edge<kPairs, MR - 1, NR>(p, i, j, m - i);
  epilogue.store(i, m - i, j, kVectors);
}

template <bool kPairs, int NR = kMaxNR, typename Epilogue>
inline void dispatch_micro_panel(const Product& p, int64_t m, int64_t j, int64_t vectors, const Epilogue& epilogue) {
  if constexpr (NR > 0) {
    if (vectors == NR / kLanes) return multiply_micro_panel<kPairs, NR>(p, m, j, epilogue);
    dispatch_micro_panel<kPairs, NR - kLanes>(p, m, j, vectors, epilogue);
  }
}

// C is m x n, n a multiple of kLanes, and is split into micro-panels as evenly as the widest
// allows. The epilogue gets each micro-tile, (row, rows, column, vectors), before and after its
// last sums.
template <bool kPairs, typename Epilogue = NoEpilogue>
void multiply(Product p, int64_t m, int64_t n, const Epilogue& epilogue = {}) {
  constexpr int64_t kRun = kPairs ? 128 : 64;  // words; short chains of sums round better
  for (int64_t k = p.k; k > 0; k -= kRun) {
    p.k = k < kRun ? k : kRun;
    int64_t vectors = n / kLanes;
    for (int64_t j = 0; vectors > 0;) {
      constexpr int kMaxVectors = kMaxNR / kLanes;
      const int64_t panels = (vectors + kMaxVectors - 1) / kMaxVectors, width = (vectors + panels - 1) / panels;
      if (k <= kRun) {
        dispatch_micro_panel<kPairs>(p, m, j, width, epilogue);
      } else {
        dispatch_micro_panel<kPairs>(p, m, j, width, NoEpilogue{});
      }
      j += width * kLanes;
      vectors -= width;
    }
    p.a += kRun * p.cs_a;
    p.b += kRun * p.rs_b;
    p.accumulate = true;
  }
}

template <int kStep, size_t... kIndex>
inline void swap_blocks(Vec& a, Vec& b, std::index_sequence<kIndex...>) {
  const Vec low = __builtin_shufflevector(a, b, (kIndex & kStep ? kLanes + kIndex - kStep : kIndex)...);
  const Vec high = __builtin_shufflevector(a, b, (kIndex & kStep ? kLanes + kIndex : kIndex + kStep)...);
  a = low, b = high;
}

// Transposes a square of words in registers.
template <int kStep = kLanes / 2>
inline void transpose(Vec (&rows)[kLanes]) {
  if constexpr (kStep > 0) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & kStep)) swap_blocks<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kLanes>{});
    }
    transpose<kStep / 2>(rows);
  }
}

// Loads the first `values` values at p as a vector of words, zero beyond.
template <bool kPairs, typename In>
inline Vec load_words(const In* p, int64_t values) {
#ifdef __AVX512BF16__
  if constexpr (kPairs) {
    const __mmask32 present = values >= 2 * kLanes ? ~0u : (1u << values) - 1;
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(present, p));
  }
#endif
  return values >= kLanes ? load(p) : load_first(p, values);
}

// Packs A, `count` rows of `width` values, as rows of words `stride` apart, zero beyond `width`.
template <bool kPairs, typename In>
void pack_a(const In* in, int64_t in_stride, int64_t count, int64_t width, float* out, int64_t stride) {
  constexpr int64_t kValues = kPairs ? 2 * kLanes : kLanes;
  for (int64_t t = 0; t < count; ++t, in += in_stride, out += stride) {
    for (int64_t i = 0; i < width; i += kValues) store(out + i / kValues * kLanes, load_words<kPairs>(in + i, width - i));
  }
}

// Packs B, given as its transpose: `count` rows of `width` values become columns of words
// [words of width][round_up(count)], zero beyond `count`.
template <bool kPairs, typename In>
void pack_b_transposed(const In* in, int64_t in_stride, int64_t count, int64_t width, float* out) {
  constexpr int64_t kValues = kPairs ? 2 * kLanes : kLanes;
  const int64_t padded = round_up(count, kLanes), depth = kPairs ? (width + 1) / 2 : width;
  for (int64_t t = 0; t < count; t += kLanes, in += kLanes * in_stride) {
    const int64_t present = count - t < kLanes ? count - t : kLanes;
    for (int64_t i = 0, k = 0; i < width; i += kValues, k += kLanes) {
      Vec square[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        square[r] = r < present ? load_words<kPairs>(in + r * in_stride + i, width - i) : Vec{};
      }
      transpose(square);
      for (int r = 0; r < kLanes && k + r < depth; ++r) store(out + (k + r) * padded + t, square[r]);
    }
  }
}

#ifdef __AVX512BF16__
inline Vec interleave(VecU16 even, VecU16 odd) {
  return reinterpret_cast<Vec>(__builtin_convertvector(even, VecU) | __builtin_convertvector(odd, VecU) << 16);
}

inline VecU16 load_bits(const bf16* p, int64_t values) {
  const __mmask16 present = values >= kLanes ? 0xffff : (1u << values) - 1;
  return reinterpret_cast<VecU16>(_mm256_maskz_loadu_epi16(present, p));
}

// Packs pairs of rows into words [(count + 1) / 2][stride], zero beyond `width`.
inline void pack_b_pairs(const bf16* in, int64_t in_stride, int64_t count, int64_t width, float* out, int64_t stride) {
  for (int64_t t = 0; t < count; t += 2, in += 2 * in_stride, out += stride) {
    for (int64_t i = 0; i < width; i += kLanes) {
      const VecU16 odd = t + 1 < count ? load_bits(in + in_stride + i, width - i) : VecU16{};
      store(out + i, interleave(load_bits(in + i, width - i), odd));
    }
  }
}
#endif

// Packs B, `count` rows of `width` values: the words of K are rows of the result.
template <bool kPairs, typename In>
inline void pack_b(const In* in, int64_t in_stride, int64_t count, int64_t width, float* out, int64_t stride) {
#ifdef __AVX512BF16__
  if constexpr (kPairs) return pack_b_pairs(in, in_stride, count, width, out, stride);
#endif
  pack_a<false>(in, in_stride, count, width, out, stride);
}

}  // namespace
}  // namespace maefast::cpu::MAEFAST_ISA
