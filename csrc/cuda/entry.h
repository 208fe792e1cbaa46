// What the boxed entries of the CUDA ops share: device and stream of a launch, its errors, checked
// inputs.
#pragma once

#include "../checks.h"
#include "image.cuh"
#include "rank.cuh"

namespace maefast::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Makes the device of a tensor current for as long as it lives; `stream` is torch's current one
// there.
class Launch {
 public:
  cudaStream_t stream;

  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("maefast ") + op + ": " + cudaGetErrorString(error));
}

inline void check_same_gpu(const char* name, const Tensor& t, const Tensor& other) {
  check(t.is_cuda() && t.get_device_index() == other.get_device_index(), name, " must be on the GPU of the other tensors");
}

// Returns `t` if it is contiguous and starts at a multiple of 16 bytes, else a copy that does.
inline Tensor packed(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

inline int narrow(const char* name, int64_t value) {
  check(value >= 0 && value <= INT32_MAX, name, " must be less than 2^31 for the CUDA kernels, it is ", value);
  return static_cast<int>(value);
}

// An image tensor as the kernels take it, and the statistics that normalise a uint8 one.
class ImageInput {
 public:
  Image image;

  ImageInput(const Tensor& imgs, int64_t patch_h, int64_t patch_w, const OptionalTensor& mean, const OptionalTensor& std) {
    check_images(imgs, patch_h, patch_w, mean, std);
    const int64_t C = imgs.size(1);
    if (mean && std) {
      mean_ = statistic("mean", *mean, imgs);
      std_ = statistic("std", *std, imgs);
    }
    narrow("a patch", C * patch_h * patch_w);
    narrow("an image", C * imgs.size(2) * imgs.size(3));
    image = {
        .data = imgs.const_data_ptr(),
        .stride_n = imgs.stride(0),
        .stride_c = imgs.stride(1),
        .stride_h = imgs.stride(2),
        .stride_w = imgs.stride(3),
        .channels = static_cast<int>(C),
        .patch_h = static_cast<int>(patch_h),
        .patch_w = static_cast<int>(patch_w),
        .by_grid_w = Divisor(static_cast<int>(imgs.size(3) / patch_w)),
        .grid_h = static_cast<int>(imgs.size(2) / patch_h),
        .mean = mean_ ? static_cast<const float*>(mean_->const_data_ptr()) : nullptr,
        .std = std_ ? static_cast<const float*>(std_->const_data_ptr()) : nullptr,
        .dtype = pixel_dtype(imgs),
    };
  }
  ImageInput(const ImageInput&) = delete;  // image points into the tensors
  ImageInput& operator=(const ImageInput&) = delete;

 private:
  static Tensor statistic(const char* name, const Tensor& t, const Tensor& imgs) {
    check_same_gpu(name, t, imgs);
    return torch::stable::contiguous(t);
  }
  OptionalTensor mean_, std_;
};

// The checked noise of random masking, and its results.
class MaskingTensors {
 public:
  Tensor noise, ids_keep, ids_restore, mask;
  Masking args;
  int64_t N;

  MaskingTensors(const Tensor& noise_in, int64_t len_keep) : noise(checked(noise_in, len_keep)), N(noise.size(0)) {
    const int64_t L = noise.size(1), kept[] = {N, len_keep};
    ids_keep = torch::stable::new_empty(noise, {kept, 2}, ScalarType::Long);
    ids_restore = torch::stable::new_empty(noise, noise.sizes(), ScalarType::Long);
    mask = torch::stable::empty_like(noise);
    args = {
        .noise = static_cast<const float*>(noise.const_data_ptr()),
        .ids_keep = static_cast<int64_t*>(ids_keep.mutable_data_ptr()),
        .ids_restore = static_cast<int64_t*>(ids_restore.mutable_data_ptr()),
        .mask = static_cast<float*>(mask.mutable_data_ptr()),
        .L = static_cast<int>(L),
        .K = static_cast<int>(len_keep),
    };
  }

 private:
  static Tensor checked(const Tensor& noise, int64_t len_keep) {
    check(noise.dim() == 2 && noise.scalar_type() == ScalarType::Float, "noise must be (N, L) float32");
    check(noise.size(1) <= kMostRanked, "random_masking on a GPU ranks up to ", kMostRanked, " patches, noise has ",
          noise.size(1));
    check(len_keep >= 0 && len_keep <= noise.size(1), "len_keep must be in [0, ", noise.size(1), "], it is ", len_keep);
    narrow("N", noise.size(0));
    return torch::stable::contiguous(noise);
  }
};

}  // namespace
}  // namespace maefast::cuda
