// unshuffle: encoded tokens back in image order, mask tokens in the gaps, positions added.
#include "isa.h"
#include "vec.h"

namespace maefast::cpu {

struct UnshuffleFwd {
  const void* x;  // [N, 1+K, D], rows dense
  DType x_dtype;
  int64_t x_stride_n, x_stride_t;
  const int64_t* ids_restore;           // [N, L]
  const float *mask_token, *pos_embed;  // [D], [1+L, D]
  void* out;                            // [N, 1+L, D]
  DType out_dtype;                      // f32, or that of x
  bool streaming;
  int64_t L, K, D;
};

struct UnshuffleBwd {
  const void* dy;  // [N, 1+L, D], rows dense
  DType dy_dtype;
  int64_t dy_stride_n, dy_stride_t;
  const int64_t* ids_restore;
  void* dx;  // [N, 1+K, D]
  DType dx_dtype;
  float* partial;  // [N, chunks, D]: gradients of mask tokens, summed over a chunk of patches
  int64_t L, K, D, chunk, chunks;
};

namespace MAEFAST_ISA {
namespace {

template <typename In, typename Out>
inline void add_row(const In* a, const float* b, Out* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(a + i) + load(b + i));
  if (i < n) store_first(out + i, load_first(a + i, n - i) + load_first(b + i, n - i), n - i);
}

template <typename In>
inline void add_row_streaming(const In* a, const float* b, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) stream(out + i, load(a + i) + load(b + i));
}

template <typename In, typename Out>
void forward(const UnshuffleFwd& args, int64_t begin, int64_t end) {
  const int64_t L = args.L, D = args.D, tokens = L + 1;
  Out* out = static_cast<Out*>(args.out) + begin * D;
  for (int64_t unit = begin; unit < end; ++unit, out += D) {
    const int64_t n = unit / tokens, t = unit % tokens;
    const int64_t rank = t == 0 ? -1 : args.ids_restore[n * L + t - 1];  // -1: class token
    const float* pos = args.pos_embed + t * D;
    const In* x = static_cast<const In*>(args.x) + n * args.x_stride_n + (1 + rank) * args.x_stride_t;
    if constexpr (sizeof(Out) == sizeof(float)) {
      if (args.streaming) {
        rank < args.K ? add_row_streaming(x, pos, out, D) : add_row_streaming(args.mask_token, pos, out, D);
        continue;
      }
    }
    rank < args.K ? add_row(x, pos, out, D) : add_row(args.mask_token, pos, out, D);
  }
  if (args.streaming) stream_fence();
}

template <typename In, typename Out>
inline void copy_row(const In* in, Out* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) store_first(out + i, load_first(in + i, n - i), n - i);
}

template <typename In>
inline void accumulate_row(const In* in, float* total, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(total + i, load(total + i) + load(in + i));
  if (i < n) store_first(total + i, load_first(total + i, n - i) + load_first(in + i, n - i), n - i);
}

template <typename In, typename Out>
void backward(const UnshuffleBwd& args, int64_t begin, int64_t end) {
  const int64_t L = args.L, K = args.K, D = args.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / args.chunks, first = unit % args.chunks * args.chunk;
    const int64_t last = first + args.chunk < L ? first + args.chunk : L;
    const In* dy = static_cast<const In*>(args.dy) + n * args.dy_stride_n;
    Out* dx = static_cast<Out*>(args.dx) + n * (1 + K) * D;
    float* total = args.partial + unit * D;
    std::memset(total, 0, D * sizeof(float));
    if (first == 0) copy_row(dy, dx, D);
    for (int64_t i = first; i < last; ++i) {
      const In* row = dy + (1 + i) * args.dy_stride_t;
      const int64_t rank = args.ids_restore[n * L + i];
      rank < K ? copy_row(row, dx + (1 + rank) * D, D) : accumulate_row(row, total, D);
    }
  }
}

}  // namespace

// Units: output rows.
void unshuffle_fwd_kernel(const UnshuffleFwd& args, int64_t begin, int64_t end) {
  visit_float(args.x_dtype, [&](auto x) {
    using In = decltype(x);
    args.out_dtype == DType::f32 ? forward<In, float>(args, begin, end) : forward<In, In>(args, begin, end);
  });
}

// Units: chunks of patches of one sample.
void unshuffle_bwd_kernel(const UnshuffleBwd& args, int64_t begin, int64_t end) {
  visit_float(args.dy_dtype, [&](auto dy) {
    visit_float(args.dx_dtype, [&](auto dx) { backward<decltype(dy), decltype(dx)>(args, begin, end); });
  });
}

}  // namespace MAEFAST_ISA

#ifdef MAEFAST_ENTRY
MAEFAST_DECLARE_KERNEL(unshuffle_fwd_kernel, UnshuffleFwd)
MAEFAST_DECLARE_KERNEL(unshuffle_bwd_kernel, UnshuffleBwd)
#endif

}  // namespace maefast::cpu

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cpu {
namespace {

// Every row of ids_restore (N, L) must be a permutation of 0 .. L-1: no read or write can then be
// out of bounds or left out.
Tensor check_permutations(const Tensor& ids_in) {
  check(ids_in.dim() == 2 && ids_in.scalar_type() == ScalarType::Long, "ids_restore must be (N, L) int64");
  Tensor ids = torch::stable::contiguous(ids_in);
  const int64_t L = ids.size(1);
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  std::vector<int64_t> seen_in(L, -1);
  for (int64_t n = 0; n < ids.size(0); ++n) {
    for (int64_t i = 0; i < L; ++i) {
      const int64_t rank = id[n * L + i];
      check(rank >= 0 && rank < L, "ids_restore must be in [0, ", L, "), row ", n, " holds ", rank);
      check(seen_in[rank] != n, "ids_restore must hold a permutation in each row, row ", n, " holds ", rank, " twice");
      seen_in[rank] = n;
    }
  }
  return ids;
}

Tensor unshuffle_fwd(const Tensor& x_in, const Tensor& ids_in, const Tensor& mask_token_in, const Tensor& pos_embed_in) {
  const Tensor ids = check_permutations(ids_in), x = x_in.dim() == 3 ? dense_rows(x_in) : x_in;
  const int64_t N = ids.size(0), L = ids.size(1);
  check(x.dim() == 3 && x.size(0) == N && x.size(1) >= 1 && x.size(1) <= L + 1,
        "x must be (N, 1+K, D) with the N of ids_restore");
  const int64_t K = x.size(1) - 1, D = x.size(2);
  check(mask_token_in.numel() == D && pos_embed_in.numel() == (1 + L) * D,
        "mask_token must be (1, 1, D) and pos_embed (1, 1+L, D)");
  const ScalarType x_dtype = x.scalar_type();
  const bool alike = mask_token_in.scalar_type() == x_dtype && pos_embed_in.scalar_type() == x_dtype;
  const ScalarType out_dtype = alike ? x_dtype : ScalarType::Float;  // two dtypes promote
  const FloatInput mask_token("mask_token", mask_token_in, D), pos_embed("pos_embed", pos_embed_in, (1 + L) * D);
  Tensor out = empty_cpu({N, 1 + L, D}, out_dtype);
  const UnshuffleFwd args{
      .x = x.const_data_ptr(),
      .x_dtype = float_dtype("x", x_dtype),
      .x_stride_n = x.stride(0),
      .x_stride_t = x.stride(1),
      .ids_restore = static_cast<const int64_t*>(ids.const_data_ptr()),
      .mask_token = mask_token.data,
      .pos_embed = pos_embed.data,
      .out = out.mutable_data_ptr(),
      .out_dtype = float_dtype("out", out_dtype),
      .streaming = may_stream(out, D),
      .L = L,
      .K = K,
      .D = D,
  };
  run(MAEFAST_KERNEL(unshuffle_fwd_kernel), args, N * (1 + L), D * 8);
  return out;
}

std::tuple<Tensor, Tensor> unshuffle_bwd(const Tensor& dy_in, const Tensor& ids_in, int64_t len_keep, ScalarType dtype) {
  const Tensor ids = check_permutations(ids_in), dy = dy_in.dim() == 3 ? dense_rows(dy_in) : dy_in;
  const int64_t N = ids.size(0), L = ids.size(1);
  check(dy.dim() == 3 && dy.size(0) == N && dy.size(1) == 1 + L, "dy must be (N, 1+L, D)");
  check(len_keep >= 0 && len_keep <= L, "len_keep must be in [0, L], it is ", len_keep);
  const int64_t D = dy.size(2);
  constexpr int64_t kChunk = 64;  // fixed: no sum depends on the threads
  const int64_t chunks = std::max<int64_t>(1, (L + kChunk - 1) / kChunk);
  const DType dx_dtype = float_dtype("dtype", dtype);
  Tensor dx = empty_cpu({N, 1 + len_keep, D}, dtype);
  Tensor dmask_token = empty_cpu({1, 1, D}, ScalarType::Float);
  std::vector<float> partial(N * chunks * D);
  const UnshuffleBwd args{
      .dy = dy.const_data_ptr(),
      .dy_dtype = float_dtype("dy", dy.scalar_type()),
      .dy_stride_n = dy.stride(0),
      .dy_stride_t = dy.stride(1),
      .ids_restore = static_cast<const int64_t*>(ids.const_data_ptr()),
      .dx = dx.mutable_data_ptr(),
      .dx_dtype = dx_dtype,
      .partial = partial.data(),
      .L = L,
      .K = len_keep,
      .D = D,
      .chunk = kChunk,
      .chunks = chunks,
  };
  run(MAEFAST_KERNEL(unshuffle_bwd_kernel), args, N * chunks, std::min(L, kChunk) * D * 8);
  std::vector<double> total(D, 0.0);
  for (int64_t unit = 0; unit < N * chunks; ++unit) {
    for (int64_t d = 0; d < D; ++d) total[d] += partial[unit * D + d];
  }
  std::copy(total.begin(), total.end(), static_cast<float*>(dmask_token.mutable_data_ptr()));
  return {dx, dmask_token};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) {
  m.impl("unshuffle_fwd", TORCH_BOX(&unshuffle_fwd));
  m.impl("unshuffle_bwd", TORCH_BOX(&unshuffle_bwd));
}

}  // namespace
}  // namespace maefast::cpu
#endif
