// The softmax of rows of scores and its gradient. Rows lie in L1, padded to whole vectors.
#pragma once

#include "product.h"

namespace maefast::cpu::MAEFAST_ISA {
namespace {

#ifdef __AVX512BF16__
MAEFAST_INLINE VecU16 round_to_bf16(Vec v) { return reinterpret_cast<VecU16>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))); }
#endif

MAEFAST_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

MAEFAST_INLINE float largest(Vec v) {
  return fold_lanes<kLanes>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// 2^x for x <= 0 by the minimax polynomial of degree 6, within 2 ulp; 0 far below, -inf included.
MAEFAST_INLINE Vec exp2_of_negative(Vec x) {
#ifdef MAEFAST_ISA_avx512
  // 2^(x - floor(x)) * 2^floor(x). GCC 12 warns of the unmasked forms.
  const __m512 exponent = reinterpret_cast<__m512>(x);
  const Vec r = reinterpret_cast<Vec>(_mm512_maskz_reduce_ps(0xffff, exponent, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  const Vec y =
      polynomial(r, {2.1702255e-4f, 1.24396883e-3f, 9.67884091e-3f, 5.54833421e-2f, 2.40229836e-1f, 6.93146984e-1f, 1.0f});
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(y), exponent));
#else
  // Adding it rounds to an integer, which is then in the low bits, with the bias of an exponent.
  constexpr float kShift = 0x1.8p23f + 127.0f;
  const Vec shifted = x + broadcast(kShift), r = x - (shifted - broadcast(kShift));
  const Vec y =
      polynomial(r, {1.53533619e-4f, 1.33988748e-3f, 9.61843736e-3f, 5.55033247e-2f, 2.40226479e-1f, 6.93147203e-1f, 1.0f});
  const Vec scaled = y * reinterpret_cast<Vec>(reinterpret_cast<VecU>(shifted) << 23);  // NaN stays NaN
  return x < broadcast(-125.0f) ? Vec{} : scaled;
#endif
}

// Sets the padding of a row to -inf, which the softmax makes zero, and returns the largest score.
inline float prepare_scores(float* s, int64_t keys, int64_t padded) {
  for (int64_t j = keys; j < padded; ++j) s[j] = -__builtin_inff();
  Vec most = load(s);
  for (int64_t j = kLanes; j < padded; j += kLanes) most = larger(load(s + j), most);
  return largest(most);
}

constexpr float kLog2E = 1.4426950408889634f;

// Turns the scores of a row into exp(scale (s - max)), in place, as words; returns 1 / their sum.
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

// Turns the scores of a row into exp(scale (s - max)), in place; returns 1 / their sum and, in
// `delta`, the row's sum of P dP.
inline float exponentiate_row(float* s, const float* dp, int64_t keys, int64_t padded, float exponent, float& delta) {
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

// Computes P and dS = P (dP - delta) of a block from exponentials and dP, in place. Pairs along the
// queries are other words than those along the keys; they go to `p` and `ds`, for the products that
// sum over queries.
template <bool kPairs>
void compute_gradient(float* s, float* dp, [[maybe_unused]] float* p, [[maybe_unused]] float* ds, const float* inverse,
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

}  // namespace
}  // namespace maefast::cpu::MAEFAST_ISA
