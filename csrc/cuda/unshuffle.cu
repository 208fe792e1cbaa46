// unshuffle on CUDA. Forward: a block is one token of several samples, which share its position.
// Backward: a row of dy goes to its token in dx or into the sum for the mask token. Fixed chunks of
// rows are summed, and a second kernel adds the chunks.
//
// A thread has kUnit neighbouring columns; threadIdx.x counts them, threadIdx.y rows.
#include <algorithm>

#include "column_sum.cuh"

namespace maefast::cuda {
namespace {

constexpr int kColumns = 64;  // of threads in a block
constexpr int kRows = 4;
constexpr int kSamples = 16;  // of a block, forward

struct UnshuffleFwd {
  const void* x;               // [N, 1+K, D]
  int64_t stride_n, stride_t;  // of x
  const int64_t* ids_restore;  // [N, L]
  const void *mask_token, *pos_embed;
  void* out;  // [N, 1+L, D]
  int64_t N;
  int L, K, D;
  Divisor by_tokens;
};

template <typename X, typename Parameter, typename Out, int kUnit>
__global__ void __launch_bounds__(kColumns* kRows) unshuffle_fwd_kernel(UnshuffleFwd a) {
  const int group = a.by_tokens.quotient(blockIdx.x), token = blockIdx.x - group * a.by_tokens.value;
  const int d = (blockIdx.y * kColumns + threadIdx.x) * kUnit;
  if (d >= a.D) return;
  const auto filler = load<kUnit>(static_cast<const Parameter*>(a.mask_token) + d);
  const auto position = load<kUnit>(static_cast<const Parameter*>(a.pos_embed) + static_cast<int64_t>(token) * a.D + d);
#pragma unroll
  for (int step = 0; step < kSamples; step += kRows) {
    const int64_t n = static_cast<int64_t>(group) * kSamples + step + threadIdx.y;
    if (n >= a.N) return;
    // Row of x: the class token is its first; a rank out of range is that of a mask token.
    const int64_t rank = token == 0 ? -1 : a.ids_restore[n * a.L + token - 1];
    const bool kept = rank < a.K && (rank >= 0 || token == 0);
    Pack<X, kUnit> value = {};
    if (kept) value = load<kUnit>(static_cast<const X*>(a.x) + n * a.stride_n + (1 + rank) * a.stride_t + d);
    Pack<Out, kUnit> sum;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const float content = kept ? to_float(value.value[e]) : to_float(filler.value[e]);
      sum.value[e] = from_float<Out>(content + to_float(position.value[e]));
    }
    store<kUnit>(static_cast<Out*>(a.out) + (n * (a.L + 1) + token) * a.D + d, sum);
  }
}

struct UnshuffleBwd {
  const void* dy;              // [N, 1+L, D]
  int64_t stride_n, stride_t;  // of dy
  const int64_t* ids_restore;  // [N, L]
  void* dx;                    // [N, 1+K, D]
  float* partial;              // [chunks, D]
  float* dmask_token;          // [D]
  int64_t rows;                // N (1 + L)
  int L, K, D, chunk, chunks;
  Divisor by_tokens;
};

template <typename Dy, typename Dx, int kUnit>
__global__ void __launch_bounds__(kColumns* kRows) unshuffle_bwd_kernel(UnshuffleBwd a) {
  const int d = (blockIdx.y * kColumns + threadIdx.x) * kUnit;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.chunk, left = a.rows - first;
  const int64_t first_n = first / (a.L + 1);
  const int first_token = static_cast<int>(first - first_n * (a.L + 1)), rows = static_cast<int>(left < a.chunk ? left : a.chunk);
  float sums[kUnit] = {};
#pragma unroll 4
  for (int r = threadIdx.y; r < rows; r += kRows) {
    const int samples = a.by_tokens.quotient(first_token + r), token = first_token + r - samples * a.by_tokens.value;
    const int64_t n = first_n + samples;
    const int64_t rank = token == 0 ? -1 : a.ids_restore[n * a.L + token - 1];
    const bool kept = rank < a.K && (rank >= 0 || token == 0);
    if (d >= a.D) continue;
    const auto dy = load<kUnit>(static_cast<const Dy*>(a.dy) + n * a.stride_n + token * a.stride_t + d);
    Pack<Dx, kUnit> dx;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const float value = to_float(dy.value[e]);
      dx.value[e] = from_float<Dx>(value);
      sums[e] += kept ? 0.0f : value;
    }
    if (kept) store<kUnit>(static_cast<Dx*>(a.dx) + (n * (1 + a.K) + 1 + rank) * a.D + d, dx);
  }
  float* own = shared<float>() + threadIdx.x * kUnit;  // [kRows, kColumns * kUnit]
  constexpr int kWidth = kColumns * kUnit;
  for (int e = 0; e < kUnit; ++e) own[threadIdx.y * kWidth + e] = sums[e];
  __syncthreads();
  if (threadIdx.y != 0 || d >= a.D) return;
  Pack<float, kUnit> total;
  for (int e = 0; e < kUnit; ++e) {
    total.value[e] = sums[e];
    for (int y = 1; y < kRows; ++y) total.value[e] += own[y * kWidth + e];
  }
  store<kUnit>(a.partial + static_cast<int64_t>(blockIdx.x) * a.D + d, total);
}

}  // namespace
}  // namespace maefast::cuda

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cuda {
namespace {

constexpr int kWholeUnit = 8;

Tensor check_ids(const Tensor& ids, const Tensor& other) {
  check(ids.dim() == 2 && ids.scalar_type() == ScalarType::Long, "ids_restore must be (N, L) int64");
  check_same_gpu("ids_restore", ids, other);
  narrow("L + 1", ids.size(1) + 1);
  return torch::stable::contiguous(ids);
}

dim3 make_grid(int64_t blocks, int D, int unit) {
  return dim3(narrow("the number of blocks", blocks), static_cast<unsigned>(divide_up(D, kColumns * unit)));
}

template <typename X, typename Parameter, typename Out>
cudaError_t forward(const UnshuffleFwd& a, bool whole_units, cudaStream_t stream) {
  const int64_t blocks = divide_up(a.N, kSamples) * (a.L + 1);
  const dim3 block(kColumns, kRows);
  if (whole_units)
    return launch(unshuffle_fwd_kernel<X, Parameter, Out, kWholeUnit>, make_grid(blocks, a.D, kWholeUnit), block, 0, stream, a);
  return launch(unshuffle_fwd_kernel<X, Parameter, Out, 1>, make_grid(blocks, a.D, 1), block, 0, stream, a);
}

Tensor unshuffle_fwd(const Tensor& x_in, const Tensor& ids_in, const Tensor& mask_token_in, const Tensor& pos_embed_in) {
  check(x_in.dim() == 3, "x must be (N, 1+K, D)");
  const Launch on(x_in);
  const Tensor ids = check_ids(ids_in, x_in), x = dense_rows(x_in);
  const Tensor mask_token = packed(mask_token_in), pos_embed = packed(pos_embed_in);
  check_same_gpu("mask_token", mask_token, x);
  check_same_gpu("pos_embed", pos_embed, x);
  const int64_t N = ids.size(0), L = ids.size(1), D = x.size(2);
  check(x.size(0) == N && x.size(1) >= 1 && x.size(1) <= L + 1, "x must be (N, 1+K, D) with the N of ids_restore");
  check(mask_token.numel() == D && pos_embed.numel() == (1 + L) * D, "mask_token must be (1, 1, D) and pos_embed (1, 1+L, D)");
  const DType dtype = float_dtype("x", x.scalar_type()), parameter = float_dtype("mask_token", mask_token.scalar_type());
  check(pos_embed.scalar_type() == mask_token.scalar_type() && (parameter == dtype || parameter == DType::f32),
        "mask_token and pos_embed must be of one dtype, float32 or that of x");
  const int64_t sizes[] = {N, 1 + L, D};
  Tensor out = torch::stable::new_empty(x, {sizes, 3}, mask_token.scalar_type());
  if (out.numel() == 0) return out;
  const UnshuffleFwd args{
      .x = x.const_data_ptr(),
      .stride_n = x.stride(0),
      .stride_t = x.stride(1),
      .ids_restore = static_cast<const int64_t*>(ids.const_data_ptr()),
      .mask_token = mask_token.const_data_ptr(),
      .pos_embed = pos_embed.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .N = N,
      .L = static_cast<int>(L),
      .K = static_cast<int>(x.size(1) - 1),
      .D = narrow("D", D),
      .by_tokens = Divisor(static_cast<int>(1 + L)),
  };
  const int64_t item = item_size(x.scalar_type());
  const bool whole_units = D % kWholeUnit == 0 && is_aligned(args.x, 16, args.stride_n * item, args.stride_t * item);
  const cudaError_t error = visit_float(dtype, [&](auto value) {
    using X = decltype(value);
    if (parameter == DType::f32) return forward<X, float, float>(args, whole_units, on.stream);
    return forward<X, X, X>(args, whole_units, on.stream);
  });
  check_launch("unshuffle_fwd", error);
  return out;
}

template <typename Dy, typename Dx>
cudaError_t backward(const UnshuffleBwd& a, bool whole_units, cudaStream_t stream) {
  const int unit = whole_units ? kWholeUnit : 1;
  const dim3 grid = make_grid(a.chunks, a.D, unit), block(kColumns, kRows);
  const size_t bytes = size_t{kColumns} * kRows * unit * sizeof(float);
  const cudaError_t error = whole_units ? launch(unshuffle_bwd_kernel<Dy, Dx, kWholeUnit>, grid, block, bytes, stream, a)
                                        : launch(unshuffle_bwd_kernel<Dy, Dx, 1>, grid, block, bytes, stream, a);
  if (error != cudaSuccess) return error;
  return sum_columns({.partial = a.partial, .total = a.dmask_token, .chunks = a.chunks, .D = a.D}, stream);
}

std::tuple<Tensor, Tensor> unshuffle_bwd(const Tensor& dy_in, const Tensor& ids_in, int64_t len_keep, ScalarType dtype) {
  check(dy_in.dim() == 3, "dy must be (N, 1+L, D)");
  const Launch on(dy_in);
  const Tensor ids = check_ids(ids_in, dy_in), dy = dense_rows(dy_in);
  const int64_t N = ids.size(0), L = ids.size(1), D = dy.size(2), rows = N * (1 + L);
  check(dy.size(0) == N && dy.size(1) == 1 + L, "dy must be (N, 1+L, D)");
  check(len_keep >= 0 && len_keep <= L, "len_keep must be in [0, L], it is ", len_keep);
  const DType dy_dtype = float_dtype("dy", dy.scalar_type()), dx_dtype = float_dtype("dtype", dtype);
  check(dy_dtype == dx_dtype || dy_dtype == DType::f32, "dy must be float32 or of the dtype of dx");
  // About 2,000 chunks of 16 to 128 rows, from the shape only: the order of the sum depends on
  // nothing else.
  const int64_t chunk = std::clamp<int64_t>(divide_up(rows, 2048), 16, 128),
                chunks = std::max<int64_t>(1, divide_up(rows, chunk));
  const int64_t dx_sizes[] = {N, 1 + len_keep, D}, token_sizes[] = {1, 1, D}, partial_sizes[] = {chunks, D};
  Tensor dx = torch::stable::new_empty(dy, {dx_sizes, 3}, dtype);
  Tensor dmask_token = torch::stable::new_empty(dy, {token_sizes, 3}, ScalarType::Float);
  if (D == 0) return {dx, dmask_token};
  Tensor partial = torch::stable::new_empty(dy, {partial_sizes, 2}, ScalarType::Float);
  const UnshuffleBwd args{
      .dy = dy.const_data_ptr(),
      .stride_n = dy.stride(0),
      .stride_t = dy.stride(1),
      .ids_restore = static_cast<const int64_t*>(ids.const_data_ptr()),
      .dx = dx.mutable_data_ptr(),
      .partial = static_cast<float*>(partial.mutable_data_ptr()),
      .dmask_token = static_cast<float*>(dmask_token.mutable_data_ptr()),
      .rows = rows,
      .L = static_cast<int>(L),
      .K = static_cast<int>(len_keep),
      .D = narrow("D", D),
      .chunk = static_cast<int>(chunk),
      .chunks = narrow("chunks", chunks),
      .by_tokens = Divisor(static_cast<int>(1 + L)),
  };
  const int64_t item = item_size(dy.scalar_type());
  const bool whole_units = D % kWholeUnit == 0 && is_aligned(args.dy, 16, args.stride_n * item, args.stride_t * item);
  const cudaError_t error = visit_float(dx_dtype, [&](auto value) {
    using Dx = decltype(value);
    if (dy_dtype == DType::f32) return backward<float, Dx>(args, whole_units, on.stream);
    return backward<Dx, Dx>(args, whole_units, on.stream);
  });
  check_launch("unshuffle_bwd", error);
  return {dx, dmask_token};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CUDA, m) {
  m.impl("unshuffle_fwd", TORCH_BOX(&unshuffle_fwd));
  m.impl("unshuffle_bwd", TORCH_BOX(&unshuffle_bwd));
}

}  // namespace
}  // namespace maefast::cuda
#endif
