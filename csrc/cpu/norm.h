// The normalised row that layer_norm and add_layer_norm share.
#pragma once

#include "rows.h"

namespace maefast::cpu {

struct Norm {
  const float *weight, *bias;  // [D]
  float eps;
  void* y;  // [rows, D]
  DType y_dtype;
  float *mean, *rstd;  // [rows]
  int64_t D;
};

namespace MAEFAST_ISA {
namespace {

// `mean` is rounded to fp32; `residue`, what is left of the mean of x - mean, keeps rows exact whose mean is far larger than
// their spread.
struct Center {
  Vec mean, residue;
};

inline Vec normalised(Vec x, Center center, Vec rstd) { return ((x - center.mean) - center.residue) * rstd; }

// The two statistics of one row, and the row normalised. Sums are of differences to the first value, so that a constant row has
// exactly variance zero.
template <typename X, typename Y>
inline void norm_row(const X* x, const Norm& args, int64_t row) {
  const int64_t D = args.D;
  const float width = static_cast<float>(D), first = load_first(x, 1)[0];
  const Vec origin = broadcast(first);
  const auto offset = sum_row<1>(D, [&](auto part, int64_t i, Vec* total) { *total += part.keep(part.load(x + i) - origin); });
  const float mean = first + offset.of[0] / width;
  const Vec center = broadcast(mean);
  const auto moments = sum_row<2>(D, [&](auto part, int64_t i, Vec* totals) {
    const Vec difference = part.keep(part.load(x + i) - center);
    totals[0] += difference;
    totals[1] += difference * difference;
  });
  const float residue = moments.of[0] / width, variance = moments.of[1] / width - residue * residue;
  const float rstd = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + args.eps);
  args.mean[row] = mean;
  args.rstd[row] = rstd;
  const Center at{center, broadcast(residue)};
  const Vec scale = broadcast(rstd);
  Y* y = static_cast<Y*>(args.y) + row * D;
  for_row(D, [&](auto part, int64_t i) {
    prefetch(x + i, D);
    part.store(y + i, normalised(part.load(x + i), at, scale) * part.load(args.weight + i) + part.load(args.bias + i));
  });
}

}  // namespace
}  // namespace MAEFAST_ISA
}  // namespace maefast::cpu
