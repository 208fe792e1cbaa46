// Matrix products on 32-bit words: a word is an fp32 value, or two bf16 values that are neighbours along the summed dimension,
// where the CPU multiplies such pairs. One micro kernel, and what packs its operands.
#pragma once

#include "vec.h"

namespace maefast::cpu::MAEFAST_ISA {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// C[M][columns] (+)= A[M][depth] B[depth][columns], all in words; A is read at row * a_row + k * a_depth.
struct Product {
  const float* a;
  int64_t a_row, a_depth;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int64_t depth;
  bool accumulate;
};

template <bool kPairs>
inline Vec multiply_add(const float* a, Vec b, Vec c) {
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

// Calls f with 0 .. kCount-1 as constants: loops over registers must be gone before the compiler gives arrays their places.
template <int kCount, typename F, int... kIndex>
__attribute__((always_inline)) inline void unrolled(F f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}

template <int kCount, typename F>
__attribute__((always_inline)) inline void unrolled(F f) {
  unrolled<kCount>(f, std::make_integer_sequence<int, kCount>{});
}

template <bool kPairs, int kRows, int kVectors>
void tile(const Product& p, int64_t row, int64_t column) {
  const float *a = p.a + row * p.a_row, *b = p.b + column;
  const int64_t a_row = p.a_row, a_depth = p.a_depth, b_stride = p.b_stride, c_stride = p.c_stride;
  float* c = p.c + row * c_stride + column;
  Vec sums[kRows][kVectors] = {};
  for (int64_t k = p.depth; k > 0; --k, a += a_depth, b += b_stride) {
    Vec columns[kVectors];
    unrolled<kVectors>([&](auto v) { columns[v] = load(b + v * kLanes); });
    unrolled<kRows>([&](auto r) {
      unrolled<kVectors>([&](auto v) { sums[r][v] = multiply_add<kPairs>(a + r * a_row, columns[v], sums[r][v]); });
    });
  }
  unrolled<kRows>([&](auto r) {
    unrolled<kVectors>([&](auto v) {
      float* to = c + r * c_stride + v * kLanes;
      store(to, p.accumulate ? load(to) + sums[r][v] : sums[r][v]);
    });
  });
}

// Tiles that fill the registers: 32 of them with AVX-512, 16 with AVX2.
constexpr int kMaxVectors = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 1;
constexpr int tile_rows(int vectors) {
  return kLanes == 16 ? (vectors <= 2 ? 12 : 24 / vectors) : kLanes == 8 ? (vectors <= 2 ? 6 : 4) : 4;
}

// The last rows of a column of tiles.
template <bool kPairs, int kRows, int kVectors>
inline void remainder(const Product& p, int64_t row, int64_t column, int64_t rows) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return tile<kPairs, kRows, kVectors>(p, row, column);
    remainder<kPairs, kRows - 1, kVectors>(p, row, column, rows);
  }
}

// Nothing to be done with a tile of C but to leave it there.
struct Keep {
  void before(int64_t, int64_t, int64_t, int64_t) const {}
  void after(int64_t, int64_t, int64_t, int64_t) const {}
};

template <bool kPairs, int kVectors, typename Finish>
void tiles(const Product& p, int64_t rows, int64_t column, const Finish& finish) {
  constexpr int kRows = tile_rows(kVectors);
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    finish.before(row, kRows, column, kVectors);
    tile<kPairs, kRows, kVectors>(p, row, column);
    finish.after(row, kRows, column, kVectors);
  }
  if (row == rows) return;
  finish.before(row, rows - row, column, kVectors);
  remainder<kPairs, kRows - 1, kVectors>(p, row, column, rows - row);
  finish.after(row, rows - row, column, kVectors);
}

template <bool kPairs, int kVectors = kMaxVectors, typename Finish>
inline void columns_of(const Product& p, int64_t rows, int64_t column, int64_t vectors, const Finish& finish) {
  if constexpr (kVectors > 0) {
    if (vectors == kVectors) return tiles<kPairs, kVectors>(p, rows, column, finish);
    columns_of<kPairs, kVectors - 1>(p, rows, column, vectors, finish);
  }
}

// C has `columns` columns, a multiple of the vector; they are split as evenly as the widest tile allows. The summed dimension
// goes in parts that are summed on their own: one long chain of additions would round worse than the reference does. finish is
// told of each tile of C, (row, rows, column, vectors), before and after it gets its last part.
template <bool kPairs, typename Finish = Keep>
void multiply(Product p, int64_t rows, int64_t columns, const Finish& finish = {}) {
  constexpr int64_t kPart = kPairs ? 128 : 64;
  for (int64_t depth = p.depth; depth > 0; depth -= kPart) {
    p.depth = depth < kPart ? depth : kPart;
    int64_t vectors = columns / kLanes;
    for (int64_t column = 0; vectors > 0;) {
      const int64_t parts = (vectors + kMaxVectors - 1) / kMaxVectors, width = (vectors + parts - 1) / parts;
      if (depth <= kPart) {
        columns_of<kPairs>(p, rows, column, width, finish);
      } else {
        columns_of<kPairs>(p, rows, column, width, Keep{});
      }
      column += width * kLanes;
      vectors -= width;
    }
    p.a += kPart * p.a_depth;
    p.b += kPart * p.b_stride;
    p.accumulate = true;
  }
}

template <int kStep, size_t... kIndex>
inline void swap_blocks(Vec& a, Vec& b, std::index_sequence<kIndex...>) {
  const Vec low = __builtin_shufflevector(a, b, (kIndex & kStep ? kLanes + kIndex - kStep : kIndex)...);
  const Vec high = __builtin_shufflevector(a, b, (kIndex & kStep ? kLanes + kIndex : kIndex + kStep)...);
  a = low, b = high;
}

// A square of words transposed in registers.
template <int kStep = kLanes / 2>
inline void transpose(Vec (&rows)[kLanes]) {
  if constexpr (kStep > 0) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & kStep)) swap_blocks<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kLanes>{});
    }
    transpose<kStep / 2>(rows);
  }
}

// The first `values` values at p as a vector of words, zero beyond.
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

// `count` rows of `width` values as words, zero up to `stride`.
template <bool kPairs, typename In>
void pack_rows(const In* in, int64_t in_stride, int64_t count, int64_t width, float* out, int64_t stride) {
  constexpr int64_t kValues = kPairs ? 2 * kLanes : kLanes;
  for (int64_t t = 0; t < count; ++t, in += in_stride, out += stride) {
    for (int64_t i = 0; i < width; i += kValues) store(out + i / kValues * kLanes, load_words<kPairs>(in + i, width - i));
  }
}

// `count` rows of `width` values as columns of words [depth][round_up(count)], zero beyond `count`.
template <bool kPairs, typename In>
void pack_columns(const In* in, int64_t in_stride, int64_t count, int64_t width, float* out) {
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

// Neighbouring tokens in one word: [(count + 1) / 2][stride], zero beyond `width`.
inline void pack_tokens(const bf16* in, int64_t in_stride, int64_t count, int64_t width, float* out, int64_t stride) {
  for (int64_t t = 0; t < count; t += 2, in += 2 * in_stride, out += stride) {
    for (int64_t i = 0; i < width; i += kLanes) {
      const VecU16 odd = t + 1 < count ? load_bits(in + in_stride + i, width - i) : VecU16{};
      store(out + i, interleave(load_bits(in + i, width - i), odd));
    }
  }
}
#endif

// B of a product that sums over tokens.
template <bool kPairs, typename In>
inline void pack_summed(const In* in, int64_t in_stride, int64_t count, int64_t width, float* out, int64_t stride) {
#ifdef __AVX512BF16__
  if constexpr (kPairs) return pack_tokens(in, in_stride, count, width, out, stride);
#endif
  pack_rows<false>(in, in_stride, count, width, out, stride);
}

}  // namespace
}  // namespace maefast::cpu::MAEFAST_ISA
