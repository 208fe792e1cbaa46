// attention: softmax(q k^T / sqrt(d)) v for every head, from packed projections to packed heads, and its gradients.
//
// A task is one head of one sample. Its q, k and v are packed once into rows a vector wide; then a block of query rows at a time
// goes through the scores, the softmax and the products while it is in L1 and L2. Backward computes the scores again and keeps
// nothing. All products are one micro kernel on 32-bit words: a word is an fp32 value, or two bf16 values that are neighbours
// along the summed dimension, where the CPU multiplies such pairs.
#include <initializer_list>

#include "isa.h"
#include "vec.h"

namespace maefast::cpu {

// One projection: head h of token t of sample n starts at n * stride_n + t * stride_t + h * d.
struct Heads {
  const void* data;
  int64_t stride_n, stride_t;
};

struct MutableHeads {
  void* data;
  int64_t stride_n, stride_t;
};

struct AttentionFwd {
  Heads q, k, v;
  MutableHeads out;
  DType dtype;
  int64_t queries, keys, heads, width;
};

struct AttentionBwd {
  Heads q, k, v, dout;
  MutableHeads dq, dk, dv;
  DType dtype;
  int64_t queries, keys, heads, width;
};

namespace MAEFAST_ISA {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The micro kernel: C[M][columns] (+)= A[M][depth] B[depth][columns], all in words; A is read at row * a_row + k * a_depth.
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

template <bool kPairs, int kVectors>
void tiles(const Product& p, int64_t rows, int64_t column) {
  constexpr int kRows = tile_rows(kVectors);
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) tile<kPairs, kRows, kVectors>(p, row, column);
  remainder<kPairs, kRows - 1, kVectors>(p, row, column, rows - row);
}

template <bool kPairs, int kVectors = kMaxVectors>
inline void columns_of(const Product& p, int64_t rows, int64_t column, int64_t vectors) {
  if constexpr (kVectors > 0) {
    if (vectors == kVectors) return tiles<kPairs, kVectors>(p, rows, column);
    columns_of<kPairs, kVectors - 1>(p, rows, column, vectors);
  }
}

// C has `columns` columns, a multiple of the vector; they are split as evenly as the widest tile allows. The summed dimension
// goes in parts that are summed on their own: one long chain of additions would round worse than the reference does.
template <bool kPairs>
void multiply(Product p, int64_t rows, int64_t columns) {
  constexpr int64_t kPart = kPairs ? 128 : 64;
  for (int64_t depth = p.depth; depth > 0; depth -= kPart) {
    p.depth = depth < kPart ? depth : kPart;
    int64_t vectors = columns / kLanes;
    for (int64_t column = 0; vectors > 0;) {
      const int64_t parts = (vectors + kMaxVectors - 1) / kMaxVectors, width = (vectors + parts - 1) / parts;
      columns_of<kPairs>(p, rows, column, width);
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

// Asks for the next task's rows while a block of this one is computed: they lie a whole token apart, which the hardware's
// prefetchers do not follow. Inlined by force: GCC takes a function of prefetches alone for one without effect and drops the
// call.
struct Ahead {
  int64_t unit, end, heads, width, queries;

  template <typename In>
  __attribute__((always_inline)) void prefetch(std::initializer_list<Heads> inputs, std::initializer_list<int64_t> counts,
                                               int64_t query, int64_t rows) const {
    if (unit >= end) return;
    constexpr int64_t kLine = 64 / sizeof(In);
    const int64_t* count = counts.begin();
    for (const Heads& input : inputs) {
      const In* in = static_cast<const In*>(input.data) + unit / heads * input.stride_n + unit % heads * width;
      const int64_t last = (query + rows) * *count / queries;
      for (int64_t t = query * *count / queries; t < last; ++t) {
        for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(in + t * input.stride_t + i, 0, 2);
      }
      ++count;
    }
  }
};

// How a head lies in scratch. depth: words that a row of `width` values takes; column: words of a row that is B of a product.
template <bool kPairs>
struct Layout {
  int64_t width;
  int64_t depth() const { return kPairs ? (width + 1) / 2 : width; }
  int64_t row() const { return round_up(depth(), kLanes); }
  int64_t column() const { return round_up(width, kLanes); }
  static int64_t tokens(int64_t count) { return kPairs ? (count + 1) / 2 : count; }
};

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
  const int64_t padded = round_up(count, kLanes), depth = Layout<kPairs>{width}.depth();
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

inline VecU16 round_to_bf16(Vec v) { return reinterpret_cast<VecU16>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))); }

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

template <typename Out>
void store_rows(const float* in, int64_t in_stride, int64_t count, int64_t width, const float* scales, float scale, Out* out,
                int64_t out_stride) {
  for (int64_t t = 0; t < count; ++t, in += in_stride, out += out_stride) {
    const Vec factor = broadcast(scales == nullptr ? scale : scales[t]);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(out + i, load(in + i) * factor);
    if (i < width) store_first(out + i, load(in + i) * factor, width - i);
  }
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float max_lane(Vec v) {
  float lanes[kLanes], most;
  store(lanes, v);
  most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// 2^x for x <= 0 by the minimax polynomial of degree 6, within 2 ulp; 0 far below, -inf included.
inline Vec exp2_of_negative(Vec x) {
#ifdef MAEFAST_ISA_avx512  // the masked forms: GCC 12 warns of the others
  const __m512 exponent = reinterpret_cast<__m512>(x);
  const Vec r =
      reinterpret_cast<Vec>(_mm512_maskz_reduce_ps(0xffff, exponent, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));  // x - floor(x)
  Vec y = broadcast(2.1702255e-4f);
  y = y * r + broadcast(1.24396883e-3f);
  y = y * r + broadcast(9.67884091e-3f);
  y = y * r + broadcast(5.54833421e-2f);
  y = y * r + broadcast(2.40229836e-1f);
  y = y * r + broadcast(6.93146984e-1f);
  y = y * r + broadcast(1.0f);
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(y), exponent));  // y * 2^floor(x)
#else
  // Adding it rounds to an integer, which is then in the low bits, with the bias of an exponent.
  constexpr float kShift = 0x1.8p23f + 127.0f;
  const Vec shifted = x + broadcast(kShift), r = x - (shifted - broadcast(kShift));
  Vec y = broadcast(1.53533619e-4f);
  y = y * r + broadcast(1.33988748e-3f);
  y = y * r + broadcast(9.61843736e-3f);
  y = y * r + broadcast(5.55033247e-2f);
  y = y * r + broadcast(2.40226479e-1f);
  y = y * r + broadcast(6.93147203e-1f);
  y = y * r + broadcast(1.0f);
  const Vec scaled = y * reinterpret_cast<Vec>(reinterpret_cast<VecU>(shifted) << 23);  // a product, so that NaN stays NaN
  return x < broadcast(-125.0f) ? Vec{} : scaled;
#endif
}

// The largest score of a row, and the padding of the row out of the softmax.
inline float prepare_scores(float* s, int64_t keys, int64_t padded) {
  for (int64_t j = keys; j < padded; ++j) s[j] = -__builtin_inff();
  Vec most = load(s);
  for (int64_t j = kLanes; j < padded; j += kLanes) most = larger(load(s + j), most);
  return max_lane(most);
}

constexpr float kLog2E = 1.4426950408889634f;

// The scores of a row to exp(scale (s - max)), in place, as words; returns 1 / their sum.
template <bool kPairs>
inline float softmax_row(float* s, int64_t keys, int64_t padded, float exponent) {
  const Vec factor = broadcast(exponent), offset = broadcast(-exponent * prepare_scores(s, keys, padded));
  Vec total = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec e = exp2_of_negative(load(s + j) * factor + offset);
    total += e;
#ifdef __AVX512BF16__
    if constexpr (kPairs) {
      const VecU16 bits = round_to_bf16(e);
      std::memcpy(s + j / 2, &bits, sizeof bits);
      continue;
    }
#endif
    store(s + j, e);
  }
  return 1.0f / sum(total);
}

template <bool kPairs, typename In>
void forward(const AttentionFwd& args, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 24;  // query rows whose scores are in the first cache together
  const Layout<kPairs> layout{args.width};
  const int64_t M = args.queries, T = args.keys, width = args.width, depth = layout.depth();
  const int64_t row = layout.row(), column = layout.column(), padded = round_up(T, kLanes), summed = layout.tokens(T);
  const float exponent = kLog2E / __builtin_sqrtf(static_cast<float>(width));
  Scratch<float> q(M * row), k_columns(depth * padded), v(summed * column), s(kBlock * padded), o(kBlock * column);
  float inverse[kBlock];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / args.heads, head = unit % args.heads * width;
    const auto at = [&](const Heads& rows) { return static_cast<const In*>(rows.data) + n * rows.stride_n + head; };
    pack_rows<kPairs>(at(args.q), args.q.stride_t, M, width, q, row);
    pack_columns<kPairs>(at(args.k), args.k.stride_t, T, width, k_columns);
    pack_summed<kPairs>(at(args.v), args.v.stride_t, T, width, v, column);
    In* out = static_cast<In*>(args.out.data) + n * args.out.stride_n + head;
    const Ahead ahead{unit + 1, end, args.heads, width, M};
    for (int64_t i = 0; i < M; i += kBlock) {
      const int64_t rows = M - i < kBlock ? M - i : kBlock;
      ahead.prefetch<In>({args.q, args.k, args.v}, {M, T, T}, i, rows);
      multiply<kPairs>({q + i * row, row, 1, k_columns, padded, s, padded, depth, false}, rows, padded);
      for (int64_t r = 0; r < rows; ++r) inverse[r] = softmax_row<kPairs>(s + r * padded, T, padded, exponent);
      multiply<kPairs>({s, padded, 1, v, column, o, column, summed, false}, rows, column);
      store_rows(o, column, rows, width, inverse, 1.0f, out + i * args.out.stride_t, args.out.stride_t);
    }
  }
}

// Scores and dP of one row to exp(scale (s - max)), in place; returns 1 / their sum and, in `delta`, the row's sum of P dP.
inline float weights_row(float* s, const float* dp, int64_t keys, int64_t padded, float exponent, float& delta) {
  const Vec factor = broadcast(exponent), offset = broadcast(-exponent * prepare_scores(s, keys, padded));
  Vec total = {}, weighted = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec e = exp2_of_negative(load(s + j) * factor + offset);
    total += e;
    weighted += e * load(dp + j);
    store(s + j, e);
  }
  const float inverse = 1.0f / sum(total);
  delta = sum(weighted) * inverse;
  return inverse;
}

// A block's P and dS = P (dP - delta) from the exponentials and dP. In words: dS along the keys in place of dP, and both along
// the queries for the products that sum over these; those are the same words but for pairs, which get them in `p` and `ds`.
template <bool kPairs>
void softmax_gradient(float* s, float* dp, [[maybe_unused]] float* p, [[maybe_unused]] float* ds, const float* inverse,
                      const float* delta, int64_t rows, int64_t padded) {
#ifdef __AVX512BF16__
  if constexpr (kPairs) {
    for (int64_t r = 0; r < rows; r += 2, p += padded, ds += padded) {
      const bool pair = r + 1 < rows;
      float *s0 = s + r * padded, *dp0 = dp + r * padded;
      const Vec inverse0 = broadcast(inverse[r]), delta0 = broadcast(delta[r]);
      const Vec inverse1 = broadcast(pair ? inverse[r + 1] : 0.0f), delta1 = broadcast(pair ? delta[r + 1] : 0.0f);
      for (int64_t j = 0; j < padded; j += kLanes) {
        const Vec p0 = load(s0 + j) * inverse0, p1 = pair ? load(s0 + padded + j) * inverse1 : Vec{};
        const VecU16 ds0 = round_to_bf16(p0 * (load(dp0 + j) - delta0));
        const VecU16 ds1 = pair ? round_to_bf16(p1 * (load(dp0 + padded + j) - delta1)) : VecU16{};
        store(p + j, interleave(round_to_bf16(p0), round_to_bf16(p1)));
        store(ds + j, interleave(ds0, ds1));
        std::memcpy(dp0 + j / 2, &ds0, sizeof ds0);
        if (pair) std::memcpy(dp0 + padded + j / 2, &ds1, sizeof ds1);
      }
    }
    return;
  }
#endif
  for (int64_t r = 0; r < rows; ++r, s += padded, dp += padded) {
    const Vec inverse_r = broadcast(inverse[r]), delta_r = broadcast(delta[r]);
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec weight = load(s + j) * inverse_r;
      store(s + j, weight);
      store(dp + j, weight * (load(dp + j) - delta_r));
    }
  }
}

template <bool kPairs, typename In>
void backward(const AttentionBwd& args, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 48;  // even; more rows would leave the caches, fewer would load and store dK and dV more often
  const Layout<kPairs> layout{args.width};
  const int64_t M = args.queries, T = args.keys, width = args.width, depth = layout.depth();
  const int64_t row = layout.row(), column = layout.column(), padded = round_up(T, kLanes), summed = layout.tokens(T);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(width)), exponent = kLog2E * scale;
  Scratch<float> q(M * row), dout(M * row), k_columns(depth * padded), v_columns(depth * padded);
  Scratch<float> k_summed(summed * column), dk(T * column), dv(T * column), dq(kBlock * column);
  Scratch<float> s(kBlock * padded), dp(kBlock * padded);
  // Words along the queries: with pairs these are others than along the width.
  Scratch<float> q_words(kPairs ? layout.tokens(M) * column : 0), dout_words(kPairs ? layout.tokens(M) * column : 0);
  Scratch<float> p_words(kPairs ? kBlock / 2 * padded : 0), ds_words(kPairs ? kBlock / 2 * padded : 0);
  const float *q_summed = kPairs ? q_words : q, *dout_summed = kPairs ? dout_words : dout;
  const float *p = kPairs ? p_words : s, *ds = kPairs ? ds_words : dp;
  float inverse[kBlock], delta[kBlock];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / args.heads, head = unit % args.heads * width;
    const auto at = [&](const Heads& rows) { return static_cast<const In*>(rows.data) + n * rows.stride_n + head; };
    const auto to = [&](const MutableHeads& rows) { return static_cast<In*>(rows.data) + n * rows.stride_n + head; };
    pack_columns<kPairs>(at(args.v), args.v.stride_t, T, width, v_columns);
    pack_columns<kPairs>(at(args.k), args.k.stride_t, T, width, k_columns);
    pack_summed<kPairs>(at(args.k), args.k.stride_t, T, width, k_summed, column);
    pack_rows<kPairs>(at(args.q), args.q.stride_t, M, width, q, row);
    pack_rows<kPairs>(at(args.dout), args.dout.stride_t, M, width, dout, row);
    if constexpr (kPairs) {
      pack_summed<kPairs>(at(args.q), args.q.stride_t, M, width, q_words, column);
      pack_summed<kPairs>(at(args.dout), args.dout.stride_t, M, width, dout_words, column);
    }
    const Ahead ahead{unit + 1, end, args.heads, width, M};
    for (int64_t i = 0; i < M; i += kBlock) {
      const int64_t rows = M - i < kBlock ? M - i : kBlock;
      ahead.prefetch<In>({args.q, args.k, args.v, args.dout}, {M, T, T, M}, i, rows);
      multiply<kPairs>({q + i * row, row, 1, k_columns, padded, s, padded, depth, false}, rows, padded);
      multiply<kPairs>({dout + i * row, row, 1, v_columns, padded, dp, padded, depth, false}, rows, padded);
      for (int64_t r = 0; r < rows; ++r) inverse[r] = weights_row(s + r * padded, dp + r * padded, T, padded, exponent, delta[r]);
      softmax_gradient<kPairs>(s, dp, p_words, ds_words, inverse, delta, rows, padded);
      multiply<kPairs>({dp, padded, 1, k_summed, column, dq, column, summed, false}, rows, column);
      store_rows(dq, column, rows, width, nullptr, scale, to(args.dq) + i * args.dq.stride_t, args.dq.stride_t);
      const int64_t from = layout.tokens(i) * column, block = layout.tokens(rows);
      multiply<kPairs>({p, 1, padded, dout_summed + from, column, dv, column, block, i > 0}, T, column);
      multiply<kPairs>({ds, 1, padded, q_summed + from, column, dk, column, block, i > 0}, T, column);
    }
    store_rows(dk, column, T, width, nullptr, scale, to(args.dk), args.dk.stride_t);
    store_rows(dv, column, T, width, nullptr, 1.0f, to(args.dv), args.dv.stride_t);
  }
}

#ifdef __AVX512BF16__
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace

// Units: heads of all samples.
void attention_fwd_kernel(const AttentionFwd& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::f32) return forward<false, float>(args, begin, end);
  if (args.dtype == DType::f16) return forward<false, f16>(args, begin, end);
  forward<kHasPairs, bf16>(args, begin, end);
}

void attention_bwd_kernel(const AttentionBwd& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::f32) return backward<false, float>(args, begin, end);
  if (args.dtype == DType::f16) return backward<false, f16>(args, begin, end);
  backward<kHasPairs, bf16>(args, begin, end);
}

}  // namespace MAEFAST_ISA

#ifdef MAEFAST_ENTRY
MAEFAST_DECLARE_KERNEL(attention_fwd_kernel, AttentionFwd)
MAEFAST_DECLARE_KERNEL(attention_bwd_kernel, AttentionBwd)
#endif

}  // namespace maefast::cpu

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cpu {
namespace {

struct Sizes {
  int64_t samples, queries, keys, heads, width;
};

// kv holds q, k and v of every token (N, T, 3 h d), or, with a q of its own (N, M, h d), k and v (N, T, 2 h d).
Sizes checked_sizes(const std::optional<Tensor>& q, const Tensor& kv, int64_t num_heads) {
  const int64_t parts = q ? 2 : 3;
  check(num_heads > 0, "num_heads must be positive, it is ", num_heads);
  check(kv.dim() == 3 && kv.size(2) % (parts * num_heads) == 0, q ? "kv must be (N, T, 2 h d)" : "qkv must be (N, T, 3 h d)",
        " with h = ", num_heads);
  const int64_t width = kv.size(2) / (parts * num_heads);
  check(width > 0 && width <= 128, "heads must be 1 to 128 wide, they are ", width);
  if (q) {
    check(q->dim() == 3 && q->size(0) == kv.size(0) && q->size(2) == num_heads * width, "q must be (N, M, h d) with the N of kv");
    check(q->scalar_type() == kv.scalar_type(), "q must have the dtype of kv");
    check(kv.size(1) > 0, "kv must hold at least one token");
  }
  return {kv.size(0), q ? q->size(1) : kv.size(1), kv.size(1), num_heads, width};
}

Heads part(const Tensor& t, int64_t first) {
  return {static_cast<const char*>(t.const_data_ptr()) + first * item_size(t.scalar_type()), t.stride(0), t.stride(1)};
}

MutableHeads mutable_part(const Tensor& t, int64_t first) {
  return {static_cast<char*>(t.mutable_data_ptr()) + first * item_size(t.scalar_type()), t.stride(0), t.stride(1)};
}

int64_t bytes_of_task(const Sizes& sizes) { return (sizes.queries + sizes.keys) * sizes.width * 8; }

Tensor attention_fwd(const std::optional<Tensor>& q_in, const Tensor& kv_in, int64_t num_heads) {
  const Sizes sizes = checked_sizes(q_in, kv_in, num_heads);
  const Tensor kv = dense_rows(kv_in), q = q_in ? dense_rows(*q_in) : kv;
  const int64_t D = sizes.heads * sizes.width, first = q_in ? 0 : D;
  Tensor out = empty_cpu({sizes.samples, sizes.queries, D}, kv.scalar_type());
  const AttentionFwd args{
      part(q, 0),    part(kv, first), part(kv, first + D), mutable_part(out, 0), float_dtype("qkv", kv.scalar_type()),
      sizes.queries, sizes.keys,      sizes.heads,         sizes.width,
  };
  run(MAEFAST_KERNEL(attention_fwd_kernel), args, sizes.queries ? sizes.samples * sizes.heads : 0, bytes_of_task(sizes));
  return out;
}

std::tuple<Tensor, Tensor> attention_bwd(const Tensor& dout_in, const std::optional<Tensor>& q_in, const Tensor& kv_in,
                                         int64_t num_heads) {
  const Sizes sizes = checked_sizes(q_in, kv_in, num_heads);
  const Tensor kv = dense_rows(kv_in), q = q_in ? dense_rows(*q_in) : kv;
  const int64_t D = sizes.heads * sizes.width, first = q_in ? 0 : D;
  check(dout_in.dim() == 3 && dout_in.size(0) == sizes.samples && dout_in.size(1) == sizes.queries && dout_in.size(2) == D,
        "dout must be (N, M, h d)");
  check(dout_in.scalar_type() == kv.scalar_type(), "dout must have the dtype of qkv");
  const Tensor dout = dense_rows(dout_in);
  Tensor dkv = empty_cpu({sizes.samples, sizes.keys, kv.size(2)}, kv.scalar_type());
  Tensor dq = empty_cpu({q_in ? sizes.samples : 0, sizes.queries, D}, kv.scalar_type());
  const AttentionBwd args{
      part(q, 0),
      part(kv, first),
      part(kv, first + D),
      part(dout, 0),
      mutable_part(q_in ? dq : dkv, 0),
      mutable_part(dkv, first),
      mutable_part(dkv, first + D),
      float_dtype("qkv", kv.scalar_type()),
      sizes.queries,
      sizes.keys,
      sizes.heads,
      sizes.width,
  };
  if (sizes.queries == 0) torch::stable::zero_(dkv);
  run(MAEFAST_KERNEL(attention_bwd_kernel), args, sizes.queries ? sizes.samples * sizes.heads : 0, bytes_of_task(sizes));
  return {dq, dkv};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace
}  // namespace maefast::cpu
#endif
