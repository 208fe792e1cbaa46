// The attention kernels on raw pointers, free of torch: 16-byte aligned, contiguous, one dtype (bf16 or fp16).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace maefast::cuda {

struct AttentionFwd {
  const void* qkv;  // [N, T, 3*h*d]
  void* out;        // [N, T, h*d]
  float* lse;       // [N, h, T] log-sum-exp of the scaled scores
  int64_t N;
  int T, h, d;
  bool bf16;
};

struct AttentionBwd {
  const void *qkv, *out;  // out is read only where T > 80
  const float* lse;
  const void* dout;  // [N, T, h*d]
  void* dqkv;        // [N, T, 3*h*d]
  int64_t N;
  int T, h, d;
  bool bf16;
};

// Why no kernel takes such a row, or nullptr.
const char* attention_cannot(int64_t T, int64_t d, bool half);

cudaError_t attention_fwd(const AttentionFwd& args, cudaStream_t stream);
cudaError_t attention_bwd(const AttentionBwd& args, cudaStream_t stream);

}  // namespace maefast::cuda
