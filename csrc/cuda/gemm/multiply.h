// Products of a Linear with fused epilogues, for sm_90a. multiply.cuh implements them; this header
// needs neither CUTLASS nor torch.
#pragma once

#include "../launch.h"

namespace maefast::cuda::gemm {

enum class Epilogue {
  bias,        // y = x W^T + bias
  none,        // y = x W, the input gradient of a Linear
  gelu,        // hidden = x W^T + bias, y = GELU(hidden before it is rounded)
  gelu_slope,  // y = x W times the slope of GELU at hidden, and its sums over tokens
};

// Rows of contiguous 16-bit values. Each row starts at a multiple of 16 bytes.
struct Operand {
  const void* data;
  int64_t stride;  // from row to row, in values
};

struct Multiply {
  Operand x;                  // [rows, depth]
  Operand weight;             // [features, depth], and [depth, features] of an input gradient
  const float* bias;          // [features] or null
  void *y, *hidden;           // [rows, features], dense
  float* sums;                // [tiles of rows, features in whole tiles] of gelu_slope, or null
  int rows, features, depth;  // all positive; features and depth are multiples of kMultiple
  int processors;             // of the GPU
};

constexpr int kTileSide = 128;  // of rows and of features
constexpr int kMultiple = 8;    // values in the 16 bytes that TMA counts by

template <Epilogue epilogue, DType dtype>
cudaError_t multiply(const Multiply& args, cudaStream_t stream);

}  // namespace maefast::cuda::gemm
