// attention(qkv, num_heads) on CUDA: from the packed output of the qkv Linear to (N, T, h*d). The
// whole row of keys is on chip.
//
// attention_tiles.inc chooses the kernel by (d, T). Short rows keep a row of scores in registers.
// Long rows are read in chunks of keys; their backward pass keeps dK and dV in registers, exchanges
// dS through shared memory and also reads O.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>

#include "attention_bwd_long.cuh"
#include "attention_bwd_row.cuh"
#include "attention_fwd.cuh"
#include "column_sum.cuh"

namespace maefast::cuda {
namespace {

// Sets the shared memory of a kernel, which may exceed 48 KB, and returns the number of
// multiprocessors: once for each kernel and device.
cudaError_t prepare(const void* kernel, int bytes, int& processors) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> prepared;
  int device;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto known = prepared.find({kernel, device}); known != prepared.end()) {
    processors = known->second;
    return cudaSuccess;
  }
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  prepared[{kernel, device}] = processors;
  return cudaSuccess;
}

template <typename Line, typename Args>
cudaError_t launch_tile(void (*kernel)(Args), int64_t N, Args args, cudaStream_t stream) {
  constexpr auto kTile = Line::kTile;
  int processors;
  if (const cudaError_t error = prepare(reinterpret_cast<const void*>(kernel), kTile.shared, processors)) return error;
  const int64_t resident = int64_t{processors} * kTile.per_sm;
  if constexpr (kTile.prefetch) args.ahead = static_cast<int>(resident);
  const int64_t blocks = kTile.stages > 1 ? std::min(N * args.h, resident) : N * args.h;
  return launch(kernel, dim3(blocks), dim3(kTile.threads_for(args.T)), kTile.shared, stream, args);
}

template <typename Element, typename Line>
cudaError_t start(const AttentionFwd& a, cudaStream_t stream) {
  const ForwardArgs args{
      .qkv = static_cast<const uint16_t*>(a.qkv),
      .out = static_cast<uint16_t*>(a.out),
      .lse = a.lse,
      .T = a.T,
      .h = a.h,
      .tasks = static_cast<int>(a.N * a.h),
      .scale = 1.0f / std::sqrt(static_cast<float>(a.d)),
  };
  return launch_tile<Line>(attention_fwd_kernel<Element, Line>, a.N, args, stream);
}

template <typename Element, typename Line>
cudaError_t start(const AttentionBwd& a, cudaStream_t stream) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.d));
  const BackwardArgs args{
      .qkv = static_cast<const uint16_t*>(a.qkv),
      .out = static_cast<const uint16_t*>(a.out),
      .lse = a.lse,
      .dout = static_cast<const uint16_t*>(a.dout),
      .dqkv = static_cast<uint16_t*>(a.dqkv),
      .sums = a.partial,
      .T = a.T,
      .h = a.h,
      .scale = scale,
      .scale_log2 = scale * kLog2e,
  };
  if constexpr (Line::kTile.rowwise) {
    return launch_tile<Line>(attention_bwd_row_kernel<Element, Line>, a.N, args, stream);
  } else {
    return launch_tile<Line>(attention_bwd_long_kernel<Element, Line>, a.N, args, stream);
  }
}

template <typename Tile>
bool takes(const Tile& tile, int64_t d, int64_t T) {
  return tile.head_width == d && T <= tile.tokens;
}

// Launches the kernel of the line that `args` names, one of Line<0>, Line<1>, ...
template <typename Element, template <int> typename Line, typename Args, int... kLines>
cudaError_t start_line(const Args& args, cudaStream_t stream, std::integer_sequence<int, kLines...>) {
  cudaError_t error = cudaErrorInvalidValue;
  int before = args.tile;
  const auto chosen = [&](const auto& tile) { return takes(tile, args.d, args.T) && before-- == 0; };
  static_cast<void>(((chosen(Line<kLines>::kTile) && ((error = start<Element, Line<kLines>>(args, stream)), true)) || ...));
  return error;
}

template <template <int> typename Line, int kCount, typename Args>
cudaError_t run(const Args& args, cudaStream_t stream) {
  if (args.N * args.h * args.T == 0) return cudaSuccess;
  constexpr auto kLines = std::make_integer_sequence<int, kCount>();
  return args.bf16 ? start_line<Bf16, Line>(args, stream, kLines) : start_line<F16, Line>(args, stream, kLines);
}

}  // namespace

int attention_tokens(int64_t d) {
  int tokens = 0;
  for (const ForwardTile& tile : kForwardTiles)
    if (tile.head_width == d) tokens = std::max(tokens, tile.tokens);
  return tokens;
}

cudaError_t attention_fwd(const AttentionFwd& args, cudaStream_t stream) {
  return run<Forward, std::size(kForwardTiles)>(args, stream);
}
cudaError_t attention_bwd(const AttentionBwd& args, cudaStream_t stream) {
  const cudaError_t error = run<Backward, std::size(kBackwardTiles)>(args, stream);
  if (error != cudaSuccess || args.dqkv_sum == nullptr) return error;
  const int chunks = args.T > 0 ? static_cast<int>(args.N) : 0;
  return sum_columns({.partial = args.partial, .total = args.dqkv_sum, .chunks = chunks, .D = 3 * args.h * args.d}, stream);
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

template <typename Tiles>
Sizes checked_sizes(const OptionalTensor& q, const Tensor& qkv, int64_t num_heads, const Tiles& tiles, int64_t tile) {
  check(!q, "q must be absent: on a GPU attention takes packed queries alone");
  check(num_heads > 0 && qkv.dim() == 3 && qkv.size(2) > 0 && qkv.size(2) % (3 * num_heads) == 0, "qkv must be (N, T, 3 h d)");
  const int64_t N = qkv.size(0), T = qkv.size(1), d = qkv.size(2) / (3 * num_heads);
  const ScalarType dtype = qkv.scalar_type();
  check(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "attention on a GPU takes bfloat16 and float16");
  const int most = attention_tokens(d);
  check(most > 0, "attention on a GPU has no kernel for heads ", d, " wide");
  check(T <= most, "attention on a GPU takes at most ", most, " tokens of heads ", d, " wide, qkv has ", T);
  const int64_t fit = std::count_if(std::begin(tiles), std::end(tiles), [&](const auto& t) { return takes(t, d, T); });
  check(tile >= 0 && tile < fit, "tile must be one of the ", fit, " that take ", T, " tokens of heads ", d, " wide, it is ",
        tile);
  check(N <= INT32_MAX / num_heads, "qkv must hold fewer than 2^31 heads, it holds ", N, " x ", num_heads);
  return {
      .N = N,
      .T = static_cast<int>(T),
      .h = static_cast<int>(num_heads),
      .d = static_cast<int>(d),
      .bf16 = dtype == ScalarType::BFloat16,
  };
}

void check_like(const char* name, const Tensor& t, const Tensor& qkv, ScalarType dtype, int64_t b, int64_t c) {
  check(t.dim() == 3 && t.size(0) == qkv.size(0) && t.size(1) == b && t.size(2) == c && t.scalar_type() == dtype, name,
        " must have the sizes and the dtype that go with qkv");
  check_same_gpu(name, t, qkv);
}

std::tuple<Tensor, Tensor> attention_fwd(const OptionalTensor& q, const Tensor& qkv_in, int64_t num_heads, int64_t tile) {
  const Sizes s = checked_sizes(q, qkv_in, num_heads, kForwardTiles, tile);
  const Launch on(qkv_in);
  const Tensor qkv = packed(qkv_in);
  const int64_t out_sizes[] = {s.N, s.T, int64_t{s.h} * s.d}, lse_sizes[] = {s.N, s.h, s.T};
  Tensor out = torch::stable::new_empty(qkv, {out_sizes, 3});
  Tensor lse = torch::stable::new_empty(qkv, {lse_sizes, 3}, ScalarType::Float);
  const AttentionFwd args{
      .qkv = qkv.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .lse = static_cast<float*>(lse.mutable_data_ptr()),
      .N = s.N,
      .T = s.T,
      .h = s.h,
      .d = s.d,
      .bf16 = s.bf16,
      .tile = static_cast<int>(tile),
  };
  check_launch("attention_fwd", attention_fwd(args, on.stream));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout_in, const OptionalTensor& q, const Tensor& qkv_in,
                                                 const OptionalTensor& out_in, const OptionalTensor& lse_in, int64_t num_heads,
                                                 bool with_dkv_sum, int64_t tile) {
  const Sizes s = checked_sizes(q, qkv_in, num_heads, kBackwardTiles, tile);
  const int64_t width = int64_t{s.h} * s.d;
  check(out_in && lse_in, "out and lse of the forward pass must be given");
  check_like("dout", dout_in, qkv_in, qkv_in.scalar_type(), s.T, width);
  check_like("out", *out_in, qkv_in, qkv_in.scalar_type(), s.T, width);
  check_like("lse", *lse_in, qkv_in, ScalarType::Float, s.h, s.T);
  const Launch on(qkv_in);
  const Tensor qkv = packed(qkv_in), dout = packed(dout_in), out = packed(*out_in), lse = packed(*lse_in);
  const int64_t no_q[] = {0, s.T, width}, partial_sizes[] = {with_dkv_sum ? s.N : 0, 3 * width},
                sum_sizes[] = {with_dkv_sum ? 3 * width : 0};
  Tensor dq = torch::stable::new_empty(qkv, {no_q, 3}), dqkv = torch::stable::empty_like(qkv);
  Tensor partial = torch::stable::new_empty(qkv, {partial_sizes, 2}, ScalarType::Float);
  Tensor dqkv_sum = torch::stable::new_empty(qkv, {sum_sizes, 1}, ScalarType::Float);
  const AttentionBwd args{
      .qkv = qkv.const_data_ptr(),
      .out = out.const_data_ptr(),
      .lse = static_cast<const float*>(lse.const_data_ptr()),
      .dout = dout.const_data_ptr(),
      .dqkv = dqkv.mutable_data_ptr(),
      .partial = with_dkv_sum ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr,
      .dqkv_sum = with_dkv_sum ? static_cast<float*>(dqkv_sum.mutable_data_ptr()) : nullptr,
      .N = s.N,
      .T = s.T,
      .h = s.h,
      .d = s.d,
      .bf16 = s.bf16,
      .tile = static_cast<int>(tile),
  };
  check_launch("attention_bwd", attention_bwd(args, on.stream));
  return {dq, dqkv, dqkv_sum};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace
}  // namespace maefast::cuda
#endif
