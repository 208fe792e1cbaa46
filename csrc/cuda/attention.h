// The attention kernels on raw pointers, without torch. Tensors are contiguous, start at a multiple
// of 16 bytes and have one dtype, bf16 or fp16.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace maefast::cuda {

struct AttentionFwd {
  const void* qkv;  // [N, T, 3*h*d]
  void* out;        // [N, T, h*d]
  float* lse;       // [N, h, T] log-sum-exp of the scaled scores
  int64_t N;
  int T, h, d;
  bool bf16;
  int tile = 0;  // number among the lines of attention_tiles.inc that fit this d and T
};

struct AttentionBwd {
  const void *qkv, *out;  // out is read only by tiles that are not rowwise
  const float* lse;
  const void* dout;  // [N, T, h*d]
  void* dqkv;        // [N, T, 3*h*d]
  float* partial;    // [N, 3*h*d], workspace of dqkv_sum
  float* dqkv_sum;   // [3*h*d], sums of the columns of dqkv; null together with partial
  int64_t N;
  int T, h, d;
  bool bf16;
  int tile = 0;
};

// Returns the longest row that a tile takes for heads of width d, 0 if no tile takes that width.
int attention_tokens(int64_t d);

// Both return cudaErrorInvalidValue if no tile fits.
cudaError_t attention_fwd(const AttentionFwd& args, cudaStream_t stream);
cudaError_t attention_bwd(const AttentionBwd& args, cudaStream_t stream);

}  // namespace maefast::cuda
