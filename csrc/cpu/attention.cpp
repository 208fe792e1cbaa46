// attention: softmax(q k^T / sqrt(d)) v for every head, from packed projections to packed heads,
// and its gradients.
//
// A task is one head of one sample. Its q, k and v are packed once. Blocks of query rows then go
// through scores, softmax and products in L1 and L2. Backward recomputes the scores; nothing is
// saved for it.
#include <initializer_list>

#include "isa.h"
#include "product.h"
#include "softmax.h"

namespace maefast::cpu {

// One projection: head h of token t of sample n starts at n * stride_n + t * stride_t + h * d.
struct Heads {
  const void* data;
  int64_t stride_n, stride_t;
};

struct MutableHeads {
  void* data;
  int64_t stride_n, stride_t;
};

struct AttentionFwd {
  Heads q, k, v;
  MutableHeads out;
  DType dtype;
  int64_t queries, keys, heads, width;
};

struct AttentionBwd {
  Heads q, k, v, dout;
  MutableHeads dq, dk, dv;
  DType dtype;
  int64_t queries, keys, heads, width;
};

namespace MAEFAST_ISA {
namespace {

// Prefetches the next task's rows while a block of this one is computed: they lie a whole token
// apart, a stride that the hardware's prefetchers do not follow. Inlined by force: GCC drops calls
// of a function that only prefetches.
struct Ahead {
  int64_t unit, end, heads, width, queries;

  template <typename In>
  __attribute__((always_inline)) void prefetch(std::initializer_list<Heads> inputs, std::initializer_list<int64_t> counts,
                                               int64_t query, int64_t rows) const {
    if (unit >= end) return;
    constexpr int64_t kLine = 64 / sizeof(In);
    const int64_t* count = counts.begin();
    for (const Heads& input : inputs) {
      const In* in = static_cast<const In*>(input.data) + unit / heads * input.stride_n + unit % heads * width;
      const int64_t last = (query + rows) * *count / queries;
      for (int64_t t = query * *count / queries; t < last; ++t) {
        for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(in + t * input.stride_t + i, 0, 2);
      }
      ++count;
    }
  }
};

// How a head lies in scratch. depth: words of a row of `width` values, which are padded to row();
// column: words of a row of B.
template <bool kPairs>
struct Layout {
  int64_t width;
  int64_t depth() const { return kPairs ? (width + 1) / 2 : width; }
  int64_t row() const { return round_up(depth(), kLanes); }
  int64_t column() const { return round_up(width, kLanes); }
  static int64_t tokens(int64_t count) { return kPairs ? (count + 1) / 2 : count; }
};

template <typename Out>
void store_rows(const float* in, int64_t in_stride, int64_t count, int64_t width, const float* scales, float scale, Out* out,
                int64_t out_stride) {
  for (int64_t t = 0; t < count; ++t, in += in_stride, out += out_stride) {
    const Vec factor = broadcast(scales == nullptr ? scale : scales[t]);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(out + i, load(in + i) * factor);
    if (i < width) store_first(out + i, load(in + i) * factor, width - i);
  }
}

template <bool kPairs, typename In>
void forward(const AttentionFwd& args, int64_t begin, int64_t end) {
  constexpr int64_t kQueries = 24;  // of a block; L1 (32 KiB): scores, 19 KiB with 197 keys
  const Layout<kPairs> layout{args.width};
  const int64_t M = args.queries, T = args.keys, width = args.width, depth = layout.depth();
  const int64_t row = layout.row(), column = layout.column(), padded = round_up(T, kLanes), summed = layout.tokens(T);
  const float exponent = kLog2E / __builtin_sqrtf(static_cast<float>(width));
  Scratch<float> q(M * row), k_columns(depth * padded), v(summed * column), s(kQueries * padded), o(kQueries * column);
  float inverse[kQueries];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / args.heads, head = unit % args.heads * width;
    const auto at = [&](const Heads& rows) { return static_cast<const In*>(rows.data) + n * rows.stride_n + head; };
    pack_a<kPairs>(at(args.q), args.q.stride_t, M, width, q, row);
    pack_b_transposed<kPairs>(at(args.k), args.k.stride_t, T, width, k_columns);
    pack_b<kPairs>(at(args.v), args.v.stride_t, T, width, v, column);
    In* out = static_cast<In*>(args.out.data) + n * args.out.stride_n + head;
    const Ahead ahead{unit + 1, end, args.heads, width, M};
    for (int64_t i = 0; i < M; i += kQueries) {
      const int64_t rows = M - i < kQueries ? M - i : kQueries;
      ahead.prefetch<In>({args.q, args.k, args.v}, {M, T, T}, i, rows);
      multiply<kPairs>(
          {.a = q + i * row, .rs_a = row, .cs_a = 1, .b = k_columns, .rs_b = padded, .c = s, .rs_c = padded, .k = depth}, rows,
          padded);
      for (int64_t r = 0; r < rows; ++r) inverse[r] = softmax_row<kPairs>(s + r * padded, T, padded, exponent);
      multiply<kPairs>({.a = s, .rs_a = padded, .cs_a = 1, .b = v, .rs_b = column, .c = o, .rs_c = column, .k = summed}, rows,
                       column);
      store_rows(o, column, rows, width, inverse, 1.0f, out + i * args.out.stride_t, args.out.stride_t);
    }
  }
}

template <bool kPairs, typename In>
void backward(const AttentionBwd& args, int64_t begin, int64_t end) {
  constexpr int64_t kQueries = 48;  // of a block, even; L2 (1 MiB): fewer load dK and dV more often
  const Layout<kPairs> layout{args.width};
  const int64_t M = args.queries, T = args.keys, width = args.width, depth = layout.depth();
  const int64_t row = layout.row(), column = layout.column(), padded = round_up(T, kLanes), summed = layout.tokens(T);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(width)), exponent = kLog2E * scale;
  Scratch<float> q(M * row), dout(M * row), k_columns(depth * padded), v_columns(depth * padded);
  Scratch<float> k_summed(summed * column), dk(T * column), dv(T * column), dq(kQueries * column);
  Scratch<float> s(kQueries * padded), dp(kQueries * padded);
  // Pairs along the queries are other words than pairs along the width.
  Scratch<float> q_words(kPairs ? layout.tokens(M) * column : 0), dout_words(kPairs ? layout.tokens(M) * column : 0);
  Scratch<float> p_words(kPairs ? kQueries / 2 * padded : 0), ds_words(kPairs ? kQueries / 2 * padded : 0);
  const float *q_summed = kPairs ? q_words : q, *dout_summed = kPairs ? dout_words : dout;
  const float *p = kPairs ? p_words : s, *ds = kPairs ? ds_words : dp;
  float inverse[kQueries], delta[kQueries];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / args.heads, head = unit % args.heads * width;
    const auto at = [&](const Heads& rows) { return static_cast<const In*>(rows.data) + n * rows.stride_n + head; };
    const auto to = [&](const MutableHeads& rows) { return static_cast<In*>(rows.data) + n * rows.stride_n + head; };
    pack_b_transposed<kPairs>(at(args.v), args.v.stride_t, T, width, v_columns);
    pack_b_transposed<kPairs>(at(args.k), args.k.stride_t, T, width, k_columns);
    pack_b<kPairs>(at(args.k), args.k.stride_t, T, width, k_summed, column);
    pack_a<kPairs>(at(args.q), args.q.stride_t, M, width, q, row);
    pack_a<kPairs>(at(args.dout), args.dout.stride_t, M, width, dout, row);
    if constexpr (kPairs) {
      pack_b<kPairs>(at(args.q), args.q.stride_t, M, width, q_words, column);
      pack_b<kPairs>(at(args.dout), args.dout.stride_t, M, width, dout_words, column);
    }
    const Ahead ahead{unit + 1, end, args.heads, width, M};
    for (int64_t i = 0; i < M; i += kQueries) {
      const int64_t rows = M - i < kQueries ? M - i : kQueries;
      ahead.prefetch<In>({args.q, args.k, args.v, args.dout}, {M, T, T, M}, i, rows);
      multiply<kPairs>(
          {.a = q + i * row, .rs_a = row, .cs_a = 1, .b = k_columns, .rs_b = padded, .c = s, .rs_c = padded, .k = depth}, rows,
          padded);
      multiply<kPairs>(
          {.a = dout + i * row, .rs_a = row, .cs_a = 1, .b = v_columns, .rs_b = padded, .c = dp, .rs_c = padded, .k = depth},
          rows, padded);
      for (int64_t r = 0; r < rows; ++r)
        inverse[r] = exponentiate_row(s + r * padded, dp + r * padded, T, padded, exponent, delta[r]);
      compute_gradient<kPairs>(s, dp, p_words, ds_words, inverse, delta, rows, padded);
      multiply<kPairs>({.a = dp, .rs_a = padded, .cs_a = 1, .b = k_summed, .rs_b = column, .c = dq, .rs_c = column, .k = summed},
                       rows, column);
      store_rows(dq, column, rows, width, nullptr, scale, to(args.dq) + i * args.dq.stride_t, args.dq.stride_t);
      const int64_t from = layout.tokens(i) * column, block = layout.tokens(rows);
      multiply<kPairs>({.a = p,
                        .rs_a = 1,
                        .cs_a = padded,
                        .b = dout_summed + from,
                        .rs_b = column,
                        .c = dv,
                        .rs_c = column,
                        .k = block,
                        .accumulate = i > 0},
                       T, column);
      multiply<kPairs>({.a = ds,
                        .rs_a = 1,
                        .cs_a = padded,
                        .b = q_summed + from,
                        .rs_b = column,
                        .c = dk,
                        .rs_c = column,
                        .k = block,
                        .accumulate = i > 0},
                       T, column);
    }
    store_rows(dk, column, T, width, nullptr, scale, to(args.dk), args.dk.stride_t);
    store_rows(dv, column, T, width, nullptr, 1.0f, to(args.dv), args.dv.stride_t);
  }
}

#ifdef __AVX512BF16__
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace

// Units: heads of all samples.
void attention_fwd_kernel(const AttentionFwd& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::f32) return forward<false, float>(args, begin, end);
  if (args.dtype == DType::f16) return forward<false, f16>(args, begin, end);
  forward<kHasPairs, bf16>(args, begin, end);
}

void attention_bwd_kernel(const AttentionBwd& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::f32) return backward<false, float>(args, begin, end);
  if (args.dtype == DType::f16) return backward<false, f16>(args, begin, end);
  backward<kHasPairs, bf16>(args, begin, end);
}

}  // namespace MAEFAST_ISA

#ifdef MAEFAST_ENTRY
MAEFAST_DECLARE_KERNEL(attention_fwd_kernel, AttentionFwd)
MAEFAST_DECLARE_KERNEL(attention_bwd_kernel, AttentionBwd)
#endif

}  // namespace maefast::cpu

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cpu {
namespace {

struct Sizes {
  int64_t samples, queries, keys, heads, width;
};

// kv holds q, k and v of every token (N, T, 3 h d), or, with a q of its own (N, M, h d), k and v
// (N, T, 2 h d).
Sizes check_sizes(const std::optional<Tensor>& q, const Tensor& kv, int64_t num_heads, int64_t tile) {
  const int64_t parts = q ? 2 : 3;
  check(tile == 0, "tile must be 0 on the CPU, it is ", tile);
  check(num_heads > 0, "num_heads must be positive, it is ", num_heads);
  check(kv.dim() == 3 && kv.size(2) % (parts * num_heads) == 0, q ? "kv must be (N, T, 2 h d)" : "qkv must be (N, T, 3 h d)",
        " with h = ", num_heads);
  const int64_t width = kv.size(2) / (parts * num_heads);
  check(width > 0 && width <= 128, "heads must be 1 to 128 wide, they are ", width);
  if (q) {
    check(q->dim() == 3 && q->size(0) == kv.size(0) && q->size(2) == num_heads * width, "q must be (N, M, h d) with the N of kv");
    check(q->scalar_type() == kv.scalar_type(), "q must have the dtype of kv");
    check(kv.size(1) > 0, "kv must hold at least one token");
  }
  return {kv.size(0), q ? q->size(1) : kv.size(1), kv.size(1), num_heads, width};
}

Heads slice(const Tensor& t, int64_t first) {
  return {static_cast<const char*>(t.const_data_ptr()) + first * item_size(t.scalar_type()), t.stride(0), t.stride(1)};
}

MutableHeads slice_mutable(const Tensor& t, int64_t first) {
  return {static_cast<char*>(t.mutable_data_ptr()) + first * item_size(t.scalar_type()), t.stride(0), t.stride(1)};
}

int64_t estimate_bytes(const Sizes& sizes) { return (sizes.queries + sizes.keys) * sizes.width * 8; }

// The backward pass needs no log-sum-exp here; it and the choice of a tile are for other devices.
std::tuple<Tensor, Tensor> attention_fwd(const std::optional<Tensor>& q_in, const Tensor& kv_in, int64_t num_heads,
                                         int64_t tile) {
  const Sizes sizes = check_sizes(q_in, kv_in, num_heads, tile);
  const Tensor kv = dense_rows(kv_in), q = q_in ? dense_rows(*q_in) : kv;
  const int64_t D = sizes.heads * sizes.width, first = q_in ? 0 : D;
  Tensor out = empty_cpu({sizes.samples, sizes.queries, D}, kv.scalar_type());
  const AttentionFwd args{
      .q = slice(q, 0),
      .k = slice(kv, first),
      .v = slice(kv, first + D),
      .out = slice_mutable(out, 0),
      .dtype = float_dtype("qkv", kv.scalar_type()),
      .queries = sizes.queries,
      .keys = sizes.keys,
      .heads = sizes.heads,
      .width = sizes.width,
  };
  run(MAEFAST_KERNEL(attention_fwd_kernel), args, sizes.queries ? sizes.samples * sizes.heads : 0, estimate_bytes(sizes));
  return {out, empty_cpu({0}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout_in, const std::optional<Tensor>& q_in, const Tensor& kv_in,
                                                 const std::optional<Tensor>&, const std::optional<Tensor>&, int64_t num_heads,
                                                 bool with_dkv_sum, int64_t tile) {
  const Sizes sizes = check_sizes(q_in, kv_in, num_heads, tile);
  const Tensor kv = dense_rows(kv_in), q = q_in ? dense_rows(*q_in) : kv;
  const int64_t D = sizes.heads * sizes.width, first = q_in ? 0 : D;
  check(dout_in.dim() == 3 && dout_in.size(0) == sizes.samples && dout_in.size(1) == sizes.queries && dout_in.size(2) == D,
        "dout must be (N, M, h d)");
  check(dout_in.scalar_type() == kv.scalar_type(), "dout must have the dtype of qkv");
  const Tensor dout = dense_rows(dout_in);
  Tensor dkv = empty_cpu({sizes.samples, sizes.keys, kv.size(2)}, kv.scalar_type());
  Tensor dq = empty_cpu({q_in ? sizes.samples : 0, sizes.queries, D}, kv.scalar_type());
  const AttentionBwd args{
      .q = slice(q, 0),
      .k = slice(kv, first),
      .v = slice(kv, first + D),
      .dout = slice(dout, 0),
      .dq = slice_mutable(q_in ? dq : dkv, 0),
      .dk = slice_mutable(dkv, first),
      .dv = slice_mutable(dkv, first + D),
      .dtype = float_dtype("qkv", kv.scalar_type()),
      .queries = sizes.queries,
      .keys = sizes.keys,
      .heads = sizes.heads,
      .width = sizes.width,
  };
  if (sizes.queries == 0) torch::stable::zero_(dkv);
  run(MAEFAST_KERNEL(attention_bwd_kernel), args, sizes.queries ? sizes.samples * sizes.heads : 0, estimate_bytes(sizes));
  const int64_t rows[] = {0, 1};
  const Tensor dkv_sum = with_dkv_sum ? torch::stable::sum(dkv, IntHeaderOnlyArrayRef(rows, 2), false, ScalarType::Float)
                                      : empty_cpu({0}, ScalarType::Float);
  return {dq, dkv, dkv_sum};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace
}  // namespace maefast::cpu
#endif
