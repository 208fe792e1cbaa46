// What the boxed entries check alike for every device.
#pragma once

#include "dtype.h"
#include "stable.h"

namespace maefast {

inline DType float_dtype(const char* name, ScalarType dtype) {
  if (dtype == ScalarType::Float) return DType::f32;
  if (dtype == ScalarType::BFloat16) return DType::bf16;
  check(dtype == ScalarType::Half, name, " must be float32, bfloat16 or float16 for the native kernels");
  return DType::f16;
}

inline DType pixel_dtype(const Tensor& imgs) {
  return imgs.scalar_type() == ScalarType::Byte ? DType::u8 : float_dtype("imgs", imgs.scalar_type());
}

// imgs (N, C, H, W) of whole patches; mean and std (C,) float32 for uint8 images, both or none.
inline void check_images(const Tensor& imgs, int64_t patch_h, int64_t patch_w, const std::optional<Tensor>& mean,
                         const std::optional<Tensor>& std) {
  check(imgs.dim() == 4, "imgs must be (N, C, H, W), it has ", imgs.dim(), " dimensions");
  check(patch_h > 0 && patch_w > 0 && imgs.size(2) % patch_h == 0 && imgs.size(3) % patch_w == 0, "the size of imgs, ",
        imgs.size(2), " x ", imgs.size(3), ", must be a multiple of the patch, ", patch_h, " x ", patch_w);
  check(mean.has_value() == std.has_value(), "mean and std must be given together");
  if (!mean || !std) return;
  check(imgs.scalar_type() == ScalarType::Byte, "mean and std are for uint8 images");
  for (const auto& [name, statistic] : {std::pair{"mean", &*mean}, std::pair{"std", &*std}})
    check(statistic->numel() == imgs.size(1) && statistic->scalar_type() == ScalarType::Float, name, " must be (C,) float32");
}

}  // namespace maefast
