// Exact GELU, v * cdf(v) with the cumulative distribution of the standard normal, and its slope.
#pragma once

#include "vec.h"

namespace maefast::cpu {
namespace MAEFAST_ISA {
namespace {

// A bound on v that lets NaN through.
MAEFAST_INLINE Vec at_most(Vec v, float bound) {
#if defined(MAEFAST_ISA_avx512)
  return reinterpret_cast<Vec>(
      _mm512_maskz_min_ps(kAllLanes, reinterpret_cast<__m512>(broadcast(bound)), reinterpret_cast<__m512>(v)));
#else
  return bound < v ? broadcast(bound) : v;
#endif
}

MAEFAST_INLINE Vec at_least(Vec v, float bound) {
#if defined(MAEFAST_ISA_avx512)
  return reinterpret_cast<Vec>(
      _mm512_maskz_max_ps(kAllLanes, reinterpret_cast<__m512>(broadcast(bound)), reinterpret_cast<__m512>(v)));
#else
  return bound > v ? broadcast(bound) : v;
#endif
}

// Returns 1 / v, on AVX-512 by a guess of 14 bits and, unless kNarrow, a Newton step: a division
// takes several times as long.
template <bool kNarrow>
MAEFAST_INLINE Vec reciprocal(Vec v) {
#if defined(MAEFAST_ISA_avx512)
  const Vec guess = reinterpret_cast<Vec>(_mm512_maskz_rcp14_ps(kAllLanes, reinterpret_cast<__m512>(v)));
  if constexpr (kNarrow) return guess;
  return guess * (2.0f - v * guess);
#else
  return 1.0f / v;
#endif
}

// With z = |v|, what gelu and its slope need: z, exp(-z^2 / 2), and the tail of the distribution,
// cdf(-z), over that.
struct Tail {
  Vec z, bell, ratio;
};

// exp(-z^2 / 2) = 2^n 2^f with |f| <= 1/2, zero from n = -127 on. The ratio is a polynomial in t =
// 1 / (1 + p z), the form of Abramowitz and Stegun 7.1.26, here around t = 1, so that it is exact
// at z = 0. All are least-maximum fits. For fp32: 2^f to 9e-8 relative, the tail to 2e-8 absolute
// and 4e-6 relative; narrow, for 16 bits: 3e-6, 4e-7 and 1e-4.
template <bool kNarrow>
MAEFAST_INLINE Tail compute_tail(Vec v) {
  constexpr float kMax = 3.402823466e38f;  // infinity times a bell of zero would be NaN
  const Vec z = at_most(reinterpret_cast<Vec>(reinterpret_cast<VecU>(v) & 0x7fffffffu), kMax);
  constexpr float kHalfLog2E = 0.72134752044f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its last bits hold an integer that is added
  const Vec power = at_least(v * v * -kHalfLog2E, -127.0f), shifted = power + kRound, f = power - (shifted - kRound);
  Vec exp2_f, s;
  Tail tail{z, {}, {}};
  if constexpr (kNarrow) {
    exp2_f = polynomial(f, {0.00958285299f, 0.0559064247f, 0.240240986f, 0.693124193f, 1.0f});
    s = 1.0f - reciprocal<kNarrow>(0.34f * z + 1.0f);
    tail.ratio = 0.5f - s * polynomial(s, {-0.10694257f, 0.199762354f, 0.22133621f, -0.98817039f, 1.17332077f});
  } else {
    exp2_f = polynomial(f, {0.00132647271f, 0.00967151265f, 0.0555073374f, 0.240222421f, 0.693146978f, 1.0f});
    s = 1.0f - reciprocal<kNarrow>(0.33f * z + 1.0f);
    tail.ratio = 0.5f - s * polynomial(s, {0.0465495417f, -0.099630055f, -0.0353165202f, 0.147851501f, 0.318541586f, -1.08679965f,
                                           1.20891638f});
  }
  tail.bell = reinterpret_cast<Vec>(reinterpret_cast<VecU>(exp2_f) + (reinterpret_cast<VecU>(shifted) << 23));
  return tail;
}

// v cdf(v) = max(v, 0) - z cdf(-z)
MAEFAST_INLINE Vec gelu(Vec v, const Tail& at) { return at_least(v, 0.0f) - at.z * (at.bell * at.ratio); }

// cdf(v) + v density(v); for z it is one less what it is for -z
MAEFAST_INLINE Vec gelu_slope(Vec v, const Tail& at) {
  constexpr float kInvSqrt2Pi = 0.39894228040f;
  const Vec left = at.bell * (at.ratio - kInvSqrt2Pi * at.z);
  return v < 0.0f ? left : 1.0f - left;
}

}  // namespace
}  // namespace MAEFAST_ISA
}  // namespace maefast::cpu
