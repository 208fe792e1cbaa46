// bias_gelu: exact GELU, v * cdf(v) with the cumulative distribution of the standard normal, of v = x + bias.
#include "isa.h"
#include "rows.h"

namespace maefast::cpu {

struct BiasGeluFwd {
  Rows x;
  const float* bias;  // [D], zeros where there is none
  void* y;            // [rows, D], in the dtype of x
  int64_t D;
};

struct BiasGeluBwd {
  Rows dy, x;
  const float* bias;
  void *dx, *y;    // [rows, D], in the dtype of x; y is null where it is not asked for
  float* partial;  // [chunks, D]: dbias of one chunk of rows
  int64_t rows, D, chunk;
};

namespace MAEFAST_ISA {
namespace {

constexpr float kFar = 13.1f;  // the distribution's tail beyond it is less than the smallest normal fp32

inline Vec clamped_below(Vec v) { return v < -kFar ? broadcast(-kFar) : v; }
inline Vec clamped(Vec v) { return clamped_below(v > kFar ? broadcast(kFar) : v); }  // NaN stays

struct Normal {
  Vec bell;  // exp(-v^2 / 2), the density times sqrt(2 pi)
  Vec cdf;
};

// exp(-v^2 / 2) = 2^n 2^f with |f| <= 1/2. With z = |v|, the tail is cdf(-z) = exp(-z^2 / 2) r(z); r is a polynomial in
// t = 1 / (1 + p z), the form of Abramowitz and Stegun 7.1.26. Both polynomials are least-maximum fits: 2^f to 2e-9 relative, the
// tail to 1e-8 absolute and 9e-7 relative.
inline Normal normal(Vec v) {
  const Vec magnitude = reinterpret_cast<Vec>(reinterpret_cast<VecU>(v) & 0x7fffffffu);
  const Vec z = magnitude < kFar ? magnitude : broadcast(kFar);
  constexpr float kHalfLog2E = 0.72134752044f, kRound = 12582912.0f;  // 1.5 * 2^23: its last bits hold an integer that is added
  const Vec power = z * z * -kHalfLog2E, shifted = power + kRound, f = power - (shifted - kRound);
  Vec p = 0.000153533618f * f + 0.00133988744f;
  p = p * f + 0.00961843736f;
  p = p * f + 0.0555033247f;
  p = p * f + 0.240226479f;
  p = p * f + 0.693147203f;
  p = p * f + 1.0f;
  Vec bell = reinterpret_cast<Vec>(reinterpret_cast<VecU>(p) + (reinterpret_cast<VecU>(shifted) << 23));
  bell = magnitude < kFar ? bell : Vec{};
  const Vec t = 1.0f / (1.0f + 0.29f * z);
  Vec r = 0.0367289148f * t - 0.179625269f;
  r = r * t + 0.277729001f;
  r = r * t - 0.117646677f;
  r = r * t + 0.162006779f;
  r = r * t + 0.0869713071f;
  r = r * t + 0.11829078f;
  r = r * t + 0.11554516f;
  const Vec tail = bell * (r * t);
  return {bell, v < 0.0f ? tail : 1.0f - tail};
}

inline Vec gelu(Vec v, Normal at) { return clamped_below(v) * at.cdf; }

inline Vec gelu_slope(Vec v, Normal at) {
  constexpr float kInvSqrt2Pi = 0.39894228040f;
  return at.cdf + clamped(v) * (at.bell * kInvSqrt2Pi);
}

template <typename X>
void forward(const BiasGeluFwd& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const X* x = row_of<X>(args.x, row);
    X* y = static_cast<X*>(args.y) + row * args.D;
    for_row(args.D, [&](auto part, int64_t i) {
      const Vec v = part.load(x + i) + part.load(args.bias + i);
      part.store(y + i, gelu(v, normal(v)));
    });
  }
}

template <typename X, typename DY>
void backward(const BiasGeluBwd& args, int64_t begin, int64_t end) {
  const int64_t D = args.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    float* dbias = args.partial + unit * D;
    std::memset(dbias, 0, D * sizeof(float));
    const int64_t first = unit * args.chunk, last = first + args.chunk < args.rows ? first + args.chunk : args.rows;
    for (int64_t row = first; row < last; ++row) {
      const X* x = row_of<X>(args.x, row);
      const DY* dy = row_of<DY>(args.dy, row);
      X *dx = static_cast<X*>(args.dx) + row * D, *y = static_cast<X*>(args.y) + row * D;
      for_row(D, [&](auto part, int64_t i) {
        const Vec v = part.load(x + i) + part.load(args.bias + i);
        const Normal at = normal(v);
        const Vec dx_i = part.load(dy + i) * gelu_slope(v, at);
        part.store(dx + i, dx_i);
        part.store(dbias + i, part.load(dbias + i) + dx_i);
        if (args.y) part.store(y + i, gelu(v, at));
      });
    }
  }
}

}  // namespace

// Units: rows.
void bias_gelu_fwd_kernel(const BiasGeluFwd& args, int64_t begin, int64_t end) {
  visit_float(args.x.dtype, [&](auto x) { forward<decltype(x)>(args, begin, end); });
}

// Units: chunks of rows.
void bias_gelu_bwd_kernel(const BiasGeluBwd& args, int64_t begin, int64_t end) {
  visit_float(args.x.dtype, [&](auto x) {
    visit_float(args.dy.dtype, [&](auto dy) { backward<decltype(x), decltype(dy)>(args, begin, end); });
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

Tensor zeros(int64_t size) {
  Tensor out = empty_cpu({size}, ScalarType::Float);
  std::memset(out.mutable_data_ptr(), 0, size * sizeof(float));
  return out;
}

Tensor bias_gelu_fwd(const Tensor& x_in, const std::optional<Tensor>& bias_in) {
  const RowsInput x("x", x_in);
  const FloatInput bias("bias", bias_in ? *bias_in : zeros(x.D), x.D);
  Tensor y = empty_cpu(x_in.sizes(), x_in.scalar_type());
  const BiasGeluFwd args{x.rows, bias.data, y.mutable_data_ptr(), x.D};
  run(MAEFAST_KERNEL(bias_gelu_fwd_kernel), args, x.count, x.D * 16);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bias_gelu_bwd(const Tensor& dy_in, const Tensor& x_in, const std::optional<Tensor>& bias_in,
                                                 bool with_y) {
  check_same_shape("dy", dy_in, x_in);
  const RowsInput dy("dy", dy_in), x("x", x_in);
  const FloatInput bias("bias", bias_in ? *bias_in : zeros(x.D), x.D);
  Tensor dx = empty_cpu(x_in.sizes(), x_in.scalar_type());
  Tensor y = with_y ? empty_cpu(x_in.sizes(), x_in.scalar_type()) : empty_cpu({0}, x_in.scalar_type());
  RowSums sums(x.count, x.D);
  const BiasGeluBwd args{
      dy.rows, x.rows, bias.data,  dx.mutable_data_ptr(), with_y ? y.mutable_data_ptr() : nullptr, sums.partial(),
      x.count, x.D,    sums.chunk,
  };
  run(MAEFAST_KERNEL(bias_gelu_bwd_kernel), args, sums.chunks, sums.chunk * x.D * 16);
  return {dx, bias_in ? sums.total(0, x.D) : empty_cpu({0}, ScalarType::Float), y};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}

}  // namespace
}  // namespace maefast::cpu
#endif
