// attention(qkv, num_heads) on CUDA: the packed output of the qkv Linear in, (N, T, h*d) out, the whole row on chip.
//
// Which kernel runs is decided by (d, T) alone:
//   T <= 80    forward and backward hold a row of scores in registers; the backward reads qkv, dO and the LSE
//   T <= 288   forward in chunks of keys; the backward keeps dK and dV in registers, exchanges dS through shared memory and
//              also reads O
#include "attention.h"

#include <cmath>
#include <mutex>
#include <set>

#include "attention_bwd_long.cuh"
#include "attention_bwd_row.cuh"
#include "attention_fwd.cuh"

namespace maefast::cuda {
namespace {

// Kernels that take more than 48 KB of shared memory must be told so, once per device.
cudaError_t allow_shared(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (!error) allowed.insert({kernel, device});
  return error;
}

template <typename Half, int D, int kBlocks, int kRows, int kTiles, bool kWhole, int kThreads, int kPerSM>
cudaError_t forward(const AttentionFwd& a, cudaStream_t stream) {
  auto* kernel = &attention_fwd_kernel<Half, D, kBlocks, kRows, kTiles, kWhole, kThreads, kPerSM>;
  constexpr int kShared = Forward<Half, D, kBlocks, kRows>::kShared;
  if (const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), kShared)) return error;
  const int threads = (a.T + 16 * kBlocks - 1) / (16 * kBlocks) * 32;
  kernel<<<static_cast<unsigned>(a.N * a.h), threads, kShared, stream>>>(static_cast<const uint16_t*>(a.qkv),
                                                                         static_cast<uint16_t*>(a.out), a.lse, a.T, a.h,
                                                                         1.0f / std::sqrt(static_cast<float>(D)));
  return cudaGetLastError();
}

template <typename Half, int D, int kBlocks, int kTiles, int kPerSM>
cudaError_t backward_row(const AttentionBwd& a, cudaStream_t stream) {
  using Shape = RowBackward<D, kBlocks>;
  auto* kernel = &attention_bwd_row_kernel<Half, D, kBlocks, kTiles, kPerSM>;
  if (const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), Shape::kShared)) return error;
  kernel<<<static_cast<unsigned>(a.N * a.h), Shape::kThreads, Shape::kShared, stream>>>(
      static_cast<const uint16_t*>(a.qkv), a.lse, static_cast<const uint16_t*>(a.dout), static_cast<uint16_t*>(a.dqkv), a.T, a.h,
      1.0f / std::sqrt(static_cast<float>(D)));
  return cudaGetLastError();
}

template <typename Half, int D, int kBlocks, int kRows, int kChunk, bool kKeepK, bool kKeepV, int kThreads, int kPerSM>
cudaError_t backward_long(const AttentionBwd& a, cudaStream_t stream) {
  auto* kernel = &attention_bwd_long_kernel<Half, D, kBlocks, kRows, kChunk, kKeepK, kKeepV, kThreads, kPerSM>;
  constexpr int kShared = LongBackward<D, kBlocks, kRows, kChunk, kKeepV, kThreads>::kShared;
  if (const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), kShared)) return error;
  const int threads = (a.T + 16 * kBlocks - 1) / (16 * kBlocks) * 32;
  kernel<<<static_cast<unsigned>(a.N * a.h), threads, kShared, stream>>>(
      static_cast<const uint16_t*>(a.qkv), static_cast<const uint16_t*>(a.out), a.lse, static_cast<const uint16_t*>(a.dout),
      static_cast<uint16_t*>(a.dqkv), a.T, a.h, 1.0f / std::sqrt(static_cast<float>(D)));
  return cudaGetLastError();
}

// The tables. Registers and shared memory of each entry are chosen together: the last argument is the CTAs that fit one SM.
template <typename Half>
cudaError_t forward_table(const AttentionFwd& a, cudaStream_t stream) {
  if (a.d == 32) {
    if (a.T <= 64) return forward<Half, 32, 1, 64, 8, true, 128, 6>(a, stream);
    if (a.T <= 80) return forward<Half, 32, 1, 80, 10, true, 160, 4>(a, stream);
    if (a.T <= 208) return forward<Half, 32, 2, 208, 4, false, 224, 2>(a, stream);
    return forward<Half, 32, 2, 288, 8, false, 288, 1>(a, stream);
  }
  if (a.d == 64) {
    if (a.T <= 56) return forward<Half, 64, 1, 64, 7, true, 128, 4>(a, stream);
    if (a.T <= 64) return forward<Half, 64, 1, 64, 8, true, 128, 4>(a, stream);
    if (a.T <= 80) return forward<Half, 64, 1, 80, 10, true, 160, 3>(a, stream);
    return forward<Half, 64, 2, 208, 4, false, 224, 1>(a, stream);
  }
  if (a.T <= 64) return forward<Half, 80, 1, 64, 8, true, 128, 4>(a, stream);
  if (a.T <= 72) return forward<Half, 80, 1, 80, 9, true, 160, 3>(a, stream);
  return forward<Half, 80, 1, 80, 10, true, 160, 3>(a, stream);
}

template <typename Half>
cudaError_t backward_table(const AttentionBwd& a, cudaStream_t stream) {
  if (a.d == 32) {
    if (a.T <= 64) return backward_row<Half, 32, 4, 8, 5>(a, stream);
    if (a.T <= 80) return backward_row<Half, 32, 5, 10, 3>(a, stream);
    if (a.T <= 208) return backward_long<Half, 32, 2, 208, 7, false, false, 224, 2>(a, stream);
    return backward_long<Half, 32, 2, 288, 9, true, true, 288, 1>(a, stream);
  }
  if (a.d == 64) {
    if (a.T <= 56) return backward_row<Half, 64, 4, 7, 4>(a, stream);
    if (a.T <= 64) return backward_row<Half, 64, 4, 8, 4>(a, stream);
    if (a.T <= 80) return backward_row<Half, 64, 5, 10, 3>(a, stream);
    return backward_long<Half, 64, 1, 208, 13, false, false, 416, 1>(a, stream);
  }
  if (a.T <= 64) return backward_row<Half, 80, 4, 8, 3>(a, stream);
  if (a.T <= 72) return backward_row<Half, 80, 5, 9, 3>(a, stream);
  return backward_row<Half, 80, 5, 10, 3>(a, stream);
}

}  // namespace

const char* attention_cannot(int64_t T, int64_t d, bool half) {
  if (!half) return "it takes bfloat16 and float16";
  if (d != 32 && d != 64 && d != 80) return "the head width must be 32, 64 or 80";
  if (d == 80 && T > 80) return "at head width 80 it takes at most 80 tokens";
  if (d == 64 && T > 208) return "at head width 64 it takes at most 208 tokens";
  if (T > 288) return "it takes at most 288 tokens";
  return nullptr;
}

cudaError_t attention_fwd(const AttentionFwd& args, cudaStream_t stream) {
  if (args.N * args.h * args.T == 0) return cudaSuccess;
  return args.bf16 ? forward_table<Bf16>(args, stream) : forward_table<F16>(args, stream);
}

cudaError_t attention_bwd(const AttentionBwd& args, cudaStream_t stream) {
  if (args.N * args.h * args.T == 0) return cudaSuccess;
  return args.bf16 ? backward_table<Bf16>(args, stream) : backward_table<F16>(args, stream);
}

}  // namespace maefast::cuda
