// What the boxed entries share: dtypes, images and rows of ids, checked. For the baseline compilation alone.
#pragma once

#include <string>
#include <vector>

#include "../stable.h"
#include "image.h"

namespace maefast::cpu {
namespace {

inline DType float_dtype(const char* name, ScalarType dtype) {
  if (dtype == ScalarType::Float) return DType::f32;
  if (dtype == ScalarType::BFloat16) return DType::bf16;
  check(dtype == ScalarType::Half, name, " must be float32, bfloat16 or float16 for the CPU kernels");
  return DType::f16;
}

// An image tensor as the kernels take it, and the normalisation of a uint8 image.
class ImageInput {
 public:
  Image image;

  ImageInput(const Tensor& imgs, int64_t patch_h, int64_t patch_w, const std::optional<Tensor>& mean,
             const std::optional<Tensor>& std) {
    check(imgs.dim() == 4, "imgs must be (N, C, H, W), it has ", imgs.dim(), " dimensions");
    check(patch_h > 0 && patch_w > 0 && imgs.size(2) % patch_h == 0 && imgs.size(3) % patch_w == 0, "the size of imgs, ",
          imgs.size(2), " x ", imgs.size(3), ", must be a multiple of the patch, ", patch_h, " x ", patch_w);
    const int64_t C = imgs.size(1);
    scale_.assign(C, 1.0f / 255.0f);
    shift_.assign(C, 0.0f);
    check(mean.has_value() == std.has_value(), "mean and std must be given together");
    if (mean && std) {
      check(imgs.scalar_type() == ScalarType::Byte, "mean and std are for uint8 images");
      const Tensor mean_c = torch::stable::contiguous(*mean), std_c = torch::stable::contiguous(*std);
      check(mean_c.numel() == C && std_c.numel() == C && mean_c.scalar_type() == ScalarType::Float &&
                std_c.scalar_type() == ScalarType::Float,
            "mean and std must be (C,) float32");
      for (int64_t c = 0; c < C; ++c) {
        const double divisor = static_cast<const float*>(std_c.const_data_ptr())[c];
        scale_[c] = static_cast<float>(1.0 / (255.0 * divisor));
        shift_[c] = static_cast<float>(-static_cast<const float*>(mean_c.const_data_ptr())[c] / divisor);
      }
    }
    image = {imgs.const_data_ptr(),
             imgs.scalar_type() == ScalarType::Byte ? DType::u8 : float_dtype("imgs", imgs.scalar_type()),
             imgs.stride(0),
             imgs.stride(1),
             imgs.stride(2),
             imgs.stride(3),
             C,
             patch_h,
             patch_w,
             imgs.size(2) / patch_h,
             imgs.size(3) / patch_w,
             scale_.data(),
             shift_.data()};
  }
  ImageInput(const ImageInput&) = delete;  // image points into scale_ and shift_
  ImageInput& operator=(const ImageInput&) = delete;

 private:
  std::vector<float> scale_, shift_;
};

}  // namespace
}  // namespace maefast::cpu
