// What the two backward kernels of attention share.
#pragma once

#include "attention_tiles.cuh"

namespace maefast::cuda {

struct BackwardArgs {
  const uint16_t *qkv, *out;  // [N, T, 3*h*D] and [N, T, h*D]
  const float* lse;           // [N, h, T]
  const uint16_t* dout;       // [N, T, h*D]
  uint16_t* dqkv;             // [N, T, 3*h*D]
  int T, h;
  float scale;
};

}  // namespace maefast::cuda
