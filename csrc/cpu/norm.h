// The normalised row that layer_norm and add_layer_norm share.
#pragma once

#include "rows.h"

namespace maefast::cpu {

struct Norm {
  const float *weight, *bias;  // [D]
  float eps;
  void* y;  // [rows, D]
  DType y_dtype;
  float *center, *rstd;  // [rows]; center is a value near the mean
  int64_t D;
};

namespace MAEFAST_ISA {
namespace {

// The mean of a row is center + residue: one fp32 value would lose digits of rows whose mean is far
// larger than their spread.
struct Mean {
  Vec center, residue;
};

MAEFAST_INLINE Vec normalise(Vec x, Mean mean, Vec rstd) { return ((x - mean.center) - mean.residue) * rstd; }

// The mean of a row, center + residue, and its variance: from the first two moments about center.
struct Moments {
  float center, residue, variance;
};

template <typename X>
inline Moments compute_moments_about(float center, const X* x, int64_t D) {
  const Vec origin = broadcast(center);
  const auto sums = sum_row<2>(D, [&](auto part, int64_t i, Vec* totals) {
    const Vec difference = part.keep(part.load(x + i) - origin);
    totals[0] += difference;
    totals[1] += difference * difference;
  });
  const float width = static_cast<float>(D), residue = sums.of[0] / width, variance = sums.of[1] / width - residue * residue;
  return {center, residue, variance < 0.0f ? 0.0f : variance};
}

// Estimates the mean of a row by its first 16 values, on every instruction set. Added by halves,
// equal values give themselves exactly.
template <typename X>
inline float estimate_center(const X* x, int64_t D) {
  constexpr int kVectors = 16 / kLanes;
  if (D < kVectors * kLanes) return load_first(x, 1)[0];
  Vec first[kVectors];
  for (int i = 0; i < kVectors; ++i) first[i] = load(x + i * kLanes);
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) first[i] += first[i + half];
  }
  return sum(first[0]) / (kVectors * kLanes);
}

// Takes moments about the estimated mean. If that is off by more than half the spread, the sums
// round worse, and they are taken again about the mean found. A constant row has exactly variance
// zero.
template <typename X>
inline Moments compute_moments(const X* x, int64_t D) {
  const Moments found = compute_moments_about(estimate_center(x, D), x, D);
  const bool is_near = 4.0f * found.residue * found.residue <= found.variance;
  return is_near ? found : compute_moments_about(found.center + found.residue, x, D);
}

// Normalises one row and stores its two statistics.
template <typename X, typename Y>
inline void norm_row(const X* x, const Norm& args, int64_t row) {
  const int64_t D = args.D;
  const Moments of_row = compute_moments(x, D);
  const float rstd = 1.0f / __builtin_sqrtf(of_row.variance + args.eps);
  args.center[row] = of_row.center;
  args.rstd[row] = rstd;
  const Mean mean{broadcast(of_row.center), broadcast(of_row.residue)};
  const Vec scale = broadcast(rstd);
  Y* y = static_cast<Y*>(args.y) + row * D;
  for_row(D, [&](auto part, int64_t i) {
    prefetch(x + i, D);
    part.store(y + i, normalise(part.load(x + i), mean, scale) * part.load(args.weight + i) + part.load(args.bias + i));
  });
}

}  // namespace
}  // namespace MAEFAST_ISA
}  // namespace maefast::cpu
