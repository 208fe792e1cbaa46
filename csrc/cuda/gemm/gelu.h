// Exact (erf) GELU and its slope, as polynomials: an epilogue cannot hide an exponential and a
// division. Needs no header of CUDA or CUTLASS, so that a test can compile it for the CPU.
// scripts/fit_gelu.py computes the coefficients.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define MAEFAST_FUNCTION __host__ __device__ __forceinline__
#else
#define MAEFAST_FUNCTION inline
#endif

namespace maefast::cuda::gemm {

// Returns the sign of v times the smaller of |v| and bound; NaN stays NaN. C++ has no expression
// for this instruction.
MAEFAST_FUNCTION float clamp_magnitude(float v, float bound) {
#ifdef __CUDA_ARCH__
  float out;
  asm("min.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(out) : "f"(v), "f"(bound));
  return out;
#else
  return std::fabs(v) > bound ? std::copysign(bound, v) : v;
#endif
}

// Returns the larger of v and bound; NaN stays NaN.
MAEFAST_FUNCTION float at_least(float v, float bound) {
#ifdef __CUDA_ARCH__
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(v), "f"(bound));
  return out;
#else
  return v < bound ? bound : v;
#endif
}

// Clamps v to [0, 1]; NaN becomes 0. This is a modifier of the instruction that computes v.
MAEFAST_FUNCTION float saturate(float v) {
#ifdef __CUDA_ARCH__
  return __saturatef(v);
#else
  return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f;
#endif
}

// Highest power first.
template <int n>
MAEFAST_FUNCTION float polynomial(float x, const float (&coefficients)[n]) {
  float p = coefficients[0];
  for (int i = 1; i < n; ++i) p = fmaf(p, x, coefficients[i]);
  return p;
}

// v cdf(v), with the cdf of the standard normal distribution. With c = v clamped to 4.375, cdf =
// 0.5 + c P(c^2 - 4.375^2 / 2). Centering c^2 keeps fp32 rounding below 1e-7. The error of v cdf(v)
// is at most 2.8e-5. Beyond the bound cdf is 0 or 1, so that infinities give 0 and infinity.
MAEFAST_FUNCTION float gelu(float v) {
  constexpr float kEnd = 4.375f;
  const float c = clamp_magnitude(v, kEnd);
  const float p = polynomial(fmaf(c, c, -kEnd * kEnd / 2),
                             {3.67949594e-11f, -1.01059727e-09f, 1.38642626e-08f, -1.98464733e-07f, 3.17795843e-06f,
                              -4.55046757e-05f, 0.000603893131f, -0.00825263653f, 0.161305577f});
  return at_least(v, -kEnd) * saturate(fmaf(p, c, 0.5f));
}

// cdf(v) + v density(v). With c = v / 4.5625 clamped to 1, it is 0.5 + c Q(c^2 - 1 / 2) with an
// error of at most 6.4e-5. Q(1 / 2) is exactly 1 / 2 in fp32, so that infinities give 0 and 1.
MAEFAST_FUNCTION float gelu_slope(float v) {
  constexpr float kEnd = 4.5625f;
  const float c = clamp_magnitude(v * (1.0f / kEnd), 1.0f);
  const float p = polynomial(fmaf(c, c, -0.5f), {-66.0084763f, 73.3869095f, -27.7018986f, 13.4110518f, -12.868989f, 7.65047741f,
                                                 -3.37677264f, 1.51521003f, -0.799760044f, 0.716303766f});
  return fmaf(p, c, 0.5f);
}

}  // namespace maefast::cuda::gemm
