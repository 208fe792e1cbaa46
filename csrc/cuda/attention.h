// The attention kernels on raw pointers, free of torch: 16-byte aligned, contiguous, one dtype (bf16 or fp16).
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
  int tile = 0;  // among the lines of attention_tiles.inc that take such a row
};

struct AttentionBwd {
  const void *qkv, *out;  // out is read only by tiles that are not rowwise
  const float* lse;
  const void* dout;  // [N, T, h*d]
  void* dqkv;        // [N, T, 3*h*d]
  float* partial;    // [N, 3*h*d], and
  float* dqkv_sum;   // [3*h*d], the columns of dqkv summed; or both null
  int64_t N;
  int T, h, d;
  bool bf16;
  int tile = 0;
};

// The longest row of heads `d` wide that there is a tile for, 0 where there is none.
int attention_tokens(int64_t d);

// cudaErrorInvalidValue where no tile takes such a row.
cudaError_t attention_fwd(const AttentionFwd& args, cudaStream_t stream);
cudaError_t attention_bwd(const AttentionBwd& args, cudaStream_t stream);

}  // namespace maefast::cuda
