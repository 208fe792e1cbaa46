// The attention kernels for ctypes, any of their tiles.
#include "attention.h"

using namespace maefast::cuda;

extern "C" {

int attention_c_tokens(int64_t d) { return attention_tokens(d); }

int attention_c_fwd(const void* qkv, void* out, float* lse, int64_t N, int T, int h, int d, int bf16, int tile, void* stream) {
  const AttentionFwd args{.qkv = qkv, .out = out, .lse = lse, .N = N, .T = T, .h = h, .d = d, .bf16 = bf16 != 0, .tile = tile};
  return attention_fwd(args, static_cast<cudaStream_t>(stream));
}

int attention_c_bwd(const void* qkv, const void* out, const float* lse, const void* dout, void* dqkv, float* partial, float* sum,
                    int64_t N, int T, int h, int d, int bf16, int tile, void* stream) {
  const AttentionBwd args{
      .qkv = qkv,
      .out = out,
      .lse = lse,
      .dout = dout,
      .dqkv = dqkv,
      .partial = partial,
      .dqkv_sum = sum,
      .N = N,
      .T = T,
      .h = h,
      .d = d,
      .bf16 = bf16 != 0,
      .tile = tile,
  };
  return attention_bwd(args, static_cast<cudaStream_t>(stream));
}
}
