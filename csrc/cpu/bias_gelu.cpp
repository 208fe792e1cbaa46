// bias_gelu: exact GELU, v * cdf(v) with the cumulative distribution of the standard normal, of v =
// x + bias.
#include "gelu.h"
#include "isa.h"
#include "rows.h"

namespace maefast::cpu {

struct BiasGeluFwd {
  Rows x;
  const float* bias;  // [D], null where there is none
  void* y;            // [rows, D], in the dtype of x
  int64_t D;
};

struct BiasGeluBwd {
  Rows dy, x;
  const float* bias;
  void *dx, *y;    // [rows, D], in the dtype of x; y is null where it is not asked for
  float* partial;  // [chunks, D]: the column sum of dx of one chunk of rows, or null
  int64_t rows, D, chunk;
};

namespace MAEFAST_ISA {
namespace {

// Results of 16 bits need no more than a narrow tail; the gradient of a bias, which is fp32, does.
template <typename X, bool kBias>
constexpr bool kNarrowTail = sizeof(X) < sizeof(float) && !kBias;

template <typename X, bool kBias>
void forward(const BiasGeluFwd& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const X* x = row_of<X>(args.x, row);
    X* y = static_cast<X*>(args.y) + row * args.D;
    for_row(args.D, [&](auto part, int64_t i) {
      Vec v = part.load(x + i);
      if constexpr (kBias) v += part.load(args.bias + i);
      part.store(y + i, gelu(v, compute_tail<kNarrowTail<X, kBias>>(v)));
    });
  }
}

template <typename X, typename DY, bool kBias>
void backward(const BiasGeluBwd& args, int64_t begin, int64_t end) {
  const int64_t D = args.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    float* dbias = args.partial == nullptr ? nullptr : args.partial + unit * D;
    if (dbias) std::memset(dbias, 0, D * sizeof(float));
    const int64_t first = unit * args.chunk, last = first + args.chunk < args.rows ? first + args.chunk : args.rows;
    for (int64_t row = first; row < last; ++row) {
      const X* x = row_of<X>(args.x, row);
      const DY* dy = row_of<DY>(args.dy, row);
      X *dx = static_cast<X*>(args.dx) + row * D, *y = static_cast<X*>(args.y) + row * D;
      for_row(D, [&](auto part, int64_t i) {
        Vec v = part.load(x + i);
        if constexpr (kBias) {
          prefetch(x + i, args.x.stride);
          prefetch(dy + i, args.dy.stride);
          v += part.load(args.bias + i);
        }
        const Tail at = compute_tail<kNarrowTail<X, kBias>>(v);
        const Vec dx_i = part.load(dy + i) * gelu_slope(v, at);
        part.store(dx + i, dx_i);
        if (dbias) part.store(dbias + i, part.load(dbias + i) + dx_i);
        if (args.y) part.store(y + i, gelu(v, at));
      });
    }
  }
}

}  // namespace

// Units: rows.
void bias_gelu_fwd_kernel(const BiasGeluFwd& args, int64_t begin, int64_t end) {
  visit_float(args.x.dtype, [&](auto x) {
    using X = decltype(x);
    args.bias ? forward<X, true>(args, begin, end) : forward<X, false>(args, begin, end);
  });
}

// Units: chunks of rows.
void bias_gelu_bwd_kernel(const BiasGeluBwd& args, int64_t begin, int64_t end) {
  visit_float(args.x.dtype, [&](auto x) {
    visit_float(args.dy.dtype, [&](auto dy) {
      using X = decltype(x);
      using DY = decltype(dy);
      args.bias ? backward<X, DY, true>(args, begin, end) : backward<X, DY, false>(args, begin, end);
    });
  });
}

}  // namespace MAEFAST_ISA

#ifdef MAEFAST_ENTRY
MAEFAST_DECLARE_KERNEL(bias_gelu_fwd_kernel, BiasGeluFwd)
MAEFAST_DECLARE_KERNEL(bias_gelu_bwd_kernel, BiasGeluBwd)
#endif

}  // namespace maefast::cpu

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cpu {
namespace {

Tensor bias_gelu_fwd(const Tensor& x_in, const std::optional<Tensor>& bias_in) {
  const RowsInput x("x", x_in);
  const FloatInput bias("bias", bias_in, x.D);
  Tensor y = empty_cpu(x_in.sizes(), x_in.scalar_type());
  const BiasGeluFwd args{
      .x = x.rows,
      .bias = bias.data,
      .y = y.mutable_data_ptr(),
      .D = x.D,
  };
  run(MAEFAST_KERNEL(bias_gelu_fwd_kernel), args, x.count, x.D * 16);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bias_gelu_bwd(const Tensor& dy_in, const Tensor& x_in, const std::optional<Tensor>& bias_in,
                                                 bool with_y, bool with_dx_sum) {
  check_same_shape("dy", dy_in, x_in);
  const RowsInput dy("dy", dy_in), x("x", x_in);
  const FloatInput bias("bias", bias_in, x.D);
  Tensor dx = empty_cpu(x_in.sizes(), x_in.scalar_type());
  Tensor y = with_y ? empty_cpu(x_in.sizes(), x_in.scalar_type()) : empty_cpu({0}, x_in.scalar_type());
  const int64_t summed = bias_in || with_dx_sum ? x.D : 0;  // columns
  RowSums sums(x.count, summed);
  const BiasGeluBwd args{
      .dy = dy.rows,
      .x = x.rows,
      .bias = bias.data,
      .dx = dx.mutable_data_ptr(),
      .y = with_y ? y.mutable_data_ptr() : nullptr,
      .partial = summed ? sums.partial() : nullptr,
      .rows = x.count,
      .D = x.D,
      .chunk = sums.chunk,
  };
  run(MAEFAST_KERNEL(bias_gelu_bwd_kernel), args, sums.chunks, sums.chunk * x.D * 16);
  return {dx, sums.total(0, summed), y};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}

}  // namespace
}  // namespace maefast::cpu
#endif
