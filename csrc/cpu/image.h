// Images as the kernels that read pixels see them: any strides, fp32, bf16, fp16 or uint8, and the
// way a row of a patch is read.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace maefast::cpu {

struct Image {
  const void* data;  // [N, C, H, W]
  DType dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t channels, patch_h, patch_w, grid_h, grid_w;
  const float* scale;  // [C], uint8 only: 1 / (255 std)
  const float* shift;  // [C], uint8 only: -mean / std

  int64_t patches() const { return grid_h * grid_w; }
  int64_t patch_values() const { return channels * patch_h * patch_w; }
  // Element offset of row y of channel c of a patch.
  int64_t row(int64_t n, int64_t patch, int64_t c, int64_t y) const {
    return n * stride_n + c * stride_c + ((patch / grid_w) * patch_h + y) * stride_h + (patch % grid_w) * patch_w * stride_w;
  }
};

namespace MAEFAST_ISA {
namespace {

template <typename In>
MAEFAST_INLINE Vec pixel(Vec v, float scale, float shift) {
  if constexpr (sizeof(In) == 1) return v * broadcast(scale) + broadcast(shift);
  return v;
}

// Copies n values, `stride` apart from p on. Without conversion the bits stay; uint8 becomes
// value * scale + shift.
template <typename In, typename Out>
inline void copy_row(const In* p, int64_t stride, Out* out, int64_t n, float scale, float shift) {
  if constexpr (std::is_same_v<In, Out>) {
    if (stride == 1) {
      std::memcpy(out, p, n * sizeof(In));
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = p[i * stride];
    }
    return;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    In lanes[kLanes] = {};
    for (int64_t j = 0; j < count; ++j) lanes[j] = p[(i + j) * stride];
    store_first(out + i, pixel<In>(load(lanes), scale, shift), count);
  }
}

// Copies one patch in conv-weight order (C, ph, pw) and calls visit(c, y) for every row.
template <typename In, typename Out, typename Visit>
inline void copy_patch(const Image& img, int64_t n, int64_t patch, Out* out, Visit visit) {
  const In* data = static_cast<const In*>(img.data) + img.row(n, patch, 0, 0);
  const int64_t width = img.patch_w;
  const bool whole_vectors = img.stride_w == 1 && width % kLanes == 0;
  for (int64_t c = 0; c < img.channels; ++c, data += img.stride_c) {
    const float scale = sizeof(In) == 1 ? img.scale[c] : 1.0f, shift = sizeof(In) == 1 ? img.shift[c] : 0.0f;
    const In* p = data;
    for (int64_t y = 0; y < img.patch_h; ++y, p += img.stride_h, out += width) {
      visit(c, y);
      if (whole_vectors) {
        for (int64_t i = 0; i < width; i += kLanes) {
          if constexpr (std::is_same_v<In, Out>) {
            std::memcpy(out + i, p + i, kLanes * sizeof(In));
          } else {
            store(out + i, pixel<In>(load(p + i), scale, shift));
          }
        }
      } else {
        copy_row(p, img.stride_w, out, width, scale, shift);
      }
    }
  }
}

// Copies a patch and prefetches the rows of patch `next` of the same image, unless it is -1: they
// lie an image row apart, a stride that the hardware's prefetchers do not follow.
template <typename In, typename Out>
inline void copy_patch(const Image& img, int64_t n, int64_t patch, int64_t next, Out* out) {
  const In* ahead = static_cast<const In*>(img.data) + img.row(n, next < 0 ? patch : next, 0, 0);
  copy_patch<In>(img, n, patch, out,
                 [&](int64_t c, int64_t y) { __builtin_prefetch(ahead + c * img.stride_c + y * img.stride_h, 0, 2); });
}

}  // namespace
}  // namespace MAEFAST_ISA
}  // namespace maefast::cpu
