// What the boxed entries share: dtypes, images, rows and parameters, checked. Only for the baseline
// compilation.
#pragma once

#include <string>
#include <vector>

#include "../checks.h"
#include "image.h"
#include "rows.h"

namespace maefast::cpu {
namespace {

// An image tensor as the kernels take it, and the normalisation of a uint8 image.
class ImageInput {
 public:
  Image image;

  ImageInput(const Tensor& imgs, int64_t patch_h, int64_t patch_w, const std::optional<Tensor>& mean,
             const std::optional<Tensor>& std) {
    check_images(imgs, patch_h, patch_w, mean, std);
    const int64_t C = imgs.size(1);
    scale_.assign(C, 1.0f / 255.0f);
    shift_.assign(C, 0.0f);
    if (mean && std) {
      const Tensor mean_c = torch::stable::contiguous(*mean), std_c = torch::stable::contiguous(*std);
      for (int64_t c = 0; c < C; ++c) {
        const double divisor = static_cast<const float*>(std_c.const_data_ptr())[c];
        scale_[c] = static_cast<float>(1.0 / (255.0 * divisor));
        shift_[c] = static_cast<float>(-static_cast<const float*>(mean_c.const_data_ptr())[c] / divisor);
      }
    }
    image = {
        .data = imgs.const_data_ptr(),
        .dtype = pixel_dtype(imgs),
        .stride_n = imgs.stride(0),
        .stride_c = imgs.stride(1),
        .stride_h = imgs.stride(2),
        .stride_w = imgs.stride(3),
        .channels = C,
        .patch_h = patch_h,
        .patch_w = patch_w,
        .grid_h = imgs.size(2) / patch_h,
        .grid_w = imgs.size(3) / patch_w,
        .scale = scale_.data(),
        .shift = shift_.data(),
    };
  }
  ImageInput(const ImageInput&) = delete;  // image points into scale_ and shift_
  ImageInput& operator=(const ImageInput&) = delete;

 private:
  std::vector<float> scale_, shift_;
};

// A tensor (..., D) as rows: itself where they are dense and equally far apart, else a contiguous
// copy.
class RowsInput {
 public:
  Rows rows;
  int64_t count, D;

  RowsInput(const char* name, const Tensor& t) : tensor_(t) {
    check(t.dim() >= 1 && t.size(t.dim() - 1) >= 1, name, " must be (..., D) with D >= 1");
    D = t.size(t.dim() - 1);
    count = t.numel() / D;
    int64_t stride = D;
    bool even = D == 1 || t.stride(t.dim() - 1) == 1;
    std::optional<int64_t> span;  // from one index to the next of the dimension outside those seen
    for (int64_t dim = t.dim() - 2; dim >= 0; --dim) {
      if (t.size(dim) == 1) continue;
      if (!span) stride = t.stride(dim);
      even = even && t.stride(dim) == span.value_or(stride);
      span = t.stride(dim) * t.size(dim);
    }
    if (!even) {
      tensor_ = torch::stable::contiguous(t);
      stride = D;
    }
    rows = {tensor_.const_data_ptr(), float_dtype(name, t.scalar_type()), stride};
  }
  RowsInput(const RowsInput&) = delete;
  RowsInput& operator=(const RowsInput&) = delete;

 private:
  Tensor tensor_;
};

inline void check_same_shape(const char* name, const Tensor& t, const Tensor& x) {
  const auto mine = t.sizes(), wanted = x.sizes();
  check(std::equal(mine.begin(), mine.end(), wanted.begin(), wanted.end()), name, " must have the shape of x");
}

// `size` fp32 values of a small tensor, converted where they are of another dtype; null where there
// is none.
class FloatInput {
 public:
  const float* data = nullptr;

  FloatInput(const char* name, const std::optional<Tensor>& t, int64_t size) {
    if (!t) return;
    check(t->numel() == size, name, " must have ", size, " values, it has ", t->numel());
    const DType dtype = float_dtype(name, t->scalar_type());
    tensor_ = torch::stable::contiguous(*t);
    data = static_cast<const float*>(tensor_->const_data_ptr());
    if (dtype == DType::f32) return;
    converted_.resize(size);
    scalar::visit_float(dtype, [&](auto value) {
      const auto* in = static_cast<const decltype(value)*>(tensor_->const_data_ptr());
      for (int64_t i = 0; i < size; ++i) scalar::store(converted_.data() + i, scalar::load(in + i));
    });
    data = converted_.data();
  }
  FloatInput(const FloatInput&) = delete;  // data points into the members
  FloatInput& operator=(const FloatInput&) = delete;

 private:
  std::optional<Tensor> tensor_;
  std::vector<float> converted_;
};

// Sums over rows in two stages: kernels sum chunks of rows in fp32, `total` adds the chunks. The
// chunks depend on the number of rows alone, so the result does not depend on the threads.
class RowSums {
 public:
  const int64_t chunk, chunks;

  RowSums(int64_t rows, int64_t width)
      : chunk(std::clamp<int64_t>(rows / 128, 16, 256)),
        chunks((rows + chunk - 1) / chunk),
        width_(width),
        partial_(chunks * width) {}
  float* partial() const { return partial_; }  // [chunks, width]

  // The sums of columns [begin, begin + count).
  Tensor total(int64_t begin, int64_t count) const {
    std::vector<double> sums(count, 0.0);
    for (int64_t c = 0; c < chunks; ++c) {
      const float* part = partial_ + c * width_ + begin;
      for (int64_t i = 0; i < count; ++i) sums[i] += part[i];
    }
    Tensor out = empty_cpu({count}, ScalarType::Float);
    std::copy(sums.begin(), sums.end(), static_cast<float*>(out.mutable_data_ptr()));
    return out;
  }

 private:
  int64_t width_;
  scalar::Scratch<float> partial_;
};

}  // namespace
}  // namespace maefast::cpu
