// The products of csrc/cuda/gemm/multiply.cuh as plain loops.
#pragma once

#include <algorithm>

#include "gelu.h"
#include "multiply.h"

namespace maefast::cuda::gemm {
namespace {

// What TMA asks of an operand; what is not so ends the call with an error.
bool is_readable(const Operand& operand, int width) {
  return reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 && operand.stride % kMultiple == 0 && operand.stride >= width;
}

template <Epilogue epilogue, typename T>
cudaError_t loops(const Multiply& a) {
  constexpr bool kForward = epilogue == Epilogue::bias || epilogue == Epilogue::gelu;
  const auto *x = static_cast<const T*>(a.x.data), *weight = static_cast<const T*>(a.weight.data);
  auto *y = static_cast<T*>(a.y), *hidden = static_cast<T*>(a.hidden);
  if (!is_readable(a.x, a.depth) || !is_readable(a.weight, kForward ? a.depth : a.features) || a.rows <= 0 || a.features <= 0 ||
      a.depth <= 0 || a.features % kMultiple != 0 || a.depth % kMultiple != 0) {
    return cudaErrorInvalidConfiguration;
  }
  const int64_t width = divide_up(a.features, kTileSide) * kTileSide;
  if (a.sums != nullptr) std::fill(a.sums, a.sums + divide_up(a.rows, kTileSide) * width, 0.0f);
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t feature = 0; feature < a.features; ++feature) {
      float sum = 0.0f;
      for (int64_t k = 0; k < a.depth; ++k) {
        const T w = kForward ? weight[feature * a.weight.stride + k] : weight[k * a.weight.stride + feature];
        sum += to_float(x[row * a.x.stride + k]) * to_float(w);
      }
      if (kForward && a.bias != nullptr) sum += a.bias[feature];
      const int64_t at = row * a.features + feature;
      if constexpr (epilogue == Epilogue::gelu) {
        hidden[at] = from_float<T>(sum);
        sum = gelu(sum);
      }
      if constexpr (epilogue == Epilogue::gelu_slope) {
        sum *= gelu_slope(to_float(hidden[at]));
        if (a.sums != nullptr) a.sums[row / kTileSide * width + feature] += sum;
      }
      y[at] = from_float<T>(sum);
    }
  }
  return cudaSuccess;
}

}  // namespace

template <Epilogue epilogue, DType dtype>
cudaError_t multiply(const Multiply& args, cudaStream_t) {
  return loops<epilogue, std::conditional_t<dtype == DType::bf16, BFloat16, Half>>(args);
}

}  // namespace maefast::cuda::gemm
