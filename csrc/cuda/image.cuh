// Images as the kernels that read pixels see them: any strides, fp32, bf16, fp16 or uint8.
#pragma once

#include "launch.h"

namespace maefast::cuda {

struct Image {
  const void* data;  // [N, C, H, W]
  int64_t stride_n, stride_c, stride_h, stride_w;
  int channels, patch_h, patch_w;
  Divisor by_grid_w;
  int grid_h;
  const float *mean, *std;  // [C] for uint8 images, or null
  DType dtype;

  __host__ __device__ int patches() const { return grid_h * by_grid_w.value; }
  __host__ __device__ int patch_values() const { return channels * patch_h * patch_w; }
  // Element offset of the first pixel of a patch.
  __device__ int64_t corner(int64_t n, int patch) const {
    const int row = by_grid_w.quotient(patch), column = patch - row * by_grid_w.value;
    return n * stride_n + row * (patch_h * stride_h) + column * (patch_w * stride_w);
  }
};

// (pixel / 255 - mean) / std of a uint8 value, the quotient by 255 correctly rounded; other pixels
// as they are.
struct Normalisation {
  float mean = 0.0f, rstd = 1.0f;

  __device__ Normalisation(const Image& imgs, int c) {
    if (imgs.mean != nullptr) {
      mean = imgs.mean[c];
      rstd = __frcp_rn(imgs.std[c]);
    }
  }
  template <typename In>
  __device__ float operator()(In pixel) const {
    const float value = to_float(pixel);
    if constexpr (!std::is_same_v<In, U8>) return value;
    constexpr float kInverse = 1.0f / 255.0f;
    const float quotient = value * kInverse;
    return (__fmaf_rn(__fmaf_rn(quotient, -255.0f, value), kInverse, quotient) - mean) * rstd;
  }
};

}  // namespace maefast::cuda
