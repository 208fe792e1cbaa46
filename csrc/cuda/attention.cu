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

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cuda {
namespace {

struct Sizes {
  int64_t N;
  int T, h, d;
  bool bf16;
};

Sizes checked_sizes(const std::optional<Tensor>& q, const Tensor& qkv, int64_t num_heads) {
  check(!q, "q must be absent: on a GPU attention takes packed queries alone");
  check(num_heads > 0 && qkv.dim() == 3 && qkv.size(2) > 0 && qkv.size(2) % (3 * num_heads) == 0, "qkv must be (N, T, 3 h d)");
  const int64_t N = qkv.size(0), T = qkv.size(1), d = qkv.size(2) / (3 * num_heads);
  const ScalarType dtype = qkv.scalar_type();
  const char* reason = attention_cannot(T, d, dtype == ScalarType::BFloat16 || dtype == ScalarType::Half);
  check(reason == nullptr, "attention on a GPU: ", reason == nullptr ? "" : reason);
  check(N <= INT32_MAX / num_heads, "qkv must hold fewer than 2^31 heads, it holds ", N, " x ", num_heads);
  return {N, static_cast<int>(T), static_cast<int>(num_heads), static_cast<int>(d), dtype == ScalarType::BFloat16};
}

void check_like(const char* name, const Tensor& t, const Tensor& qkv, ScalarType dtype, int64_t b, int64_t c) {
  check(t.dim() == 3 && t.size(0) == qkv.size(0) && t.size(1) == b && t.size(2) == c && t.scalar_type() == dtype, name,
        " must have the sizes and the dtype that go with qkv");
  check(t.is_cuda() && t.get_device_index() == qkv.get_device_index(), name, " must be on the GPU of qkv");
}

std::tuple<Tensor, Tensor> attention_fwd(const std::optional<Tensor>& q, const Tensor& qkv_in, int64_t num_heads) {
  const Sizes s = checked_sizes(q, qkv_in, num_heads);
  const Launch launch(qkv_in);
  const Tensor qkv = packed(qkv_in);
  const int64_t out_sizes[] = {s.N, s.T, int64_t{s.h} * s.d}, lse_sizes[] = {s.N, s.h, s.T};
  Tensor out = torch::stable::new_empty(qkv, {out_sizes, 3});
  Tensor lse = torch::stable::new_empty(qkv, {lse_sizes, 3}, ScalarType::Float);
  const AttentionFwd args{
      qkv.const_data_ptr(), out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr()), s.N, s.T, s.h, s.d, s.bf16};
  check_launch("attention_fwd", attention_fwd(args, launch.stream));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout_in, const std::optional<Tensor>& q, const Tensor& qkv_in,
                                                 const std::optional<Tensor>& out_in, const std::optional<Tensor>& lse_in,
                                                 int64_t num_heads, bool with_dkv_sum) {
  const Sizes s = checked_sizes(q, qkv_in, num_heads);
  const int64_t width = int64_t{s.h} * s.d;
  check(out_in && lse_in, "out and lse of the forward pass must be given");
  check_like("dout", dout_in, qkv_in, qkv_in.scalar_type(), s.T, width);
  check_like("out", *out_in, qkv_in, qkv_in.scalar_type(), s.T, width);
  check_like("lse", *lse_in, qkv_in, ScalarType::Float, s.h, s.T);
  const Launch launch(qkv_in);
  const Tensor qkv = packed(qkv_in), dout = packed(dout_in), out = packed(*out_in), lse = packed(*lse_in);
  const int64_t no_q[] = {0, s.T, width};
  Tensor dq = torch::stable::new_empty(qkv, {no_q, 3}), dqkv = torch::stable::empty_like(qkv);
  const AttentionBwd args{qkv.const_data_ptr(),
                          out.const_data_ptr(),
                          static_cast<const float*>(lse.const_data_ptr()),
                          dout.const_data_ptr(),
                          dqkv.mutable_data_ptr(),
                          s.N,
                          s.T,
                          s.h,
                          s.d,
                          s.bf16};
  check_launch("attention_bwd", attention_bwd(args, launch.stream));
  return {dq, dqkv, column_sum(dqkv, with_dkv_sum)};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace
}  // namespace maefast::cuda
#endif
