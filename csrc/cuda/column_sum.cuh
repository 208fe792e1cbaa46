// The second stage of a sum over rows: the sums of fixed chunks, added in a fixed order.
#pragma once

#include "launch.h"

namespace maefast::cuda {
namespace {

struct ColumnSum {
  const float* partial;  // [chunks, D]
  float* total;          // [D]
  int chunks, D;
};

constexpr int kSumColumns = 8;
constexpr int kSumRows = 32;

// Thread y adds every kSumRows-th chunk, then thread 0 adds the sums of the threads.
__global__ void __launch_bounds__(kSumColumns* kSumRows) column_sum_kernel(ColumnSum a) {
  const int d = blockIdx.x * kSumColumns + threadIdx.x;
  float sum = 0.0f;
  if (d < a.D) {
#pragma unroll 8
    for (int c = threadIdx.y; c < a.chunks; c += kSumRows) sum += a.partial[static_cast<int64_t>(c) * a.D + d];
  }
  float* sums = shared<float>() + threadIdx.x;  // [kSumRows, kSumColumns]
  sums[threadIdx.y * kSumColumns] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || d >= a.D) return;
  for (int y = 1; y < kSumRows; ++y) sum += sums[y * kSumColumns];
  a.total[d] = sum;
}

inline cudaError_t sum_columns(const ColumnSum& args, cudaStream_t stream) {
  const size_t bytes = size_t{kSumColumns} * kSumRows * sizeof(float);
  return launch(column_sum_kernel, dim3(divide_up(args.D, kSumColumns)), dim3(kSumColumns, kSumRows), bytes, stream, args);
}

}  // namespace
}  // namespace maefast::cuda
