// bias_gelu: exact GELU, v * cdf(v) with the cumulative distribution of the standard normal, of v = x + bias.
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
  float* partial;  // [chunks, D]: dbias of one chunk of rows, where there is a bias
  int64_t rows, D, chunk;
};

namespace MAEFAST_ISA {
namespace {

// A bound on v that lets NaN through.
inline Vec at_most(Vec v, float bound) {
#if defined(MAEFAST_ISA_avx512)
  return reinterpret_cast<Vec>(
      _mm512_maskz_min_ps(kAllLanes, reinterpret_cast<__m512>(broadcast(bound)), reinterpret_cast<__m512>(v)));
#else
  return bound < v ? broadcast(bound) : v;
#endif
}

inline Vec at_least(Vec v, float bound) {
#if defined(MAEFAST_ISA_avx512)
  return reinterpret_cast<Vec>(
      _mm512_maskz_max_ps(kAllLanes, reinterpret_cast<__m512>(broadcast(bound)), reinterpret_cast<__m512>(v)));
#else
  return bound > v ? broadcast(bound) : v;
#endif
}

// 1 / v; on AVX-512 by a guess of 14 bits and, unless a narrow result is enough, a Newton step: a division takes several times as
// long.
template <bool kNarrow>
inline Vec reciprocal(Vec v) {
#if defined(MAEFAST_ISA_avx512)
  const Vec guess = reinterpret_cast<Vec>(_mm512_maskz_rcp14_ps(kAllLanes, reinterpret_cast<__m512>(v)));
  if constexpr (kNarrow) return guess;
  return guess * (2.0f - v * guess);
#else
  return 1.0f / v;
#endif
}

template <int N>
inline Vec polynomial(Vec v, const float (&coefficients)[N]) {  // the highest power first
  Vec p = broadcast(coefficients[0]);
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) p = p * v + coefficients[i];
  return p;
}

// With z = |v|, what gelu and its slope need: z, exp(-z^2 / 2), and the tail of the distribution, cdf(-z), over that.
struct Tail {
  Vec z, bell, ratio;
};

// exp(-z^2 / 2) = 2^n 2^f with |f| <= 1/2, zero from n = -127 on. The ratio is a polynomial in t = 1 / (1 + p z), the form of
// Abramowitz and Stegun 7.1.26, here around t = 1, so that it is exact at z = 0. All are least-maximum fits. For fp32: 2^f to
// 9e-8 relative, the tail to 2e-8 absolute and 4e-6 relative; narrow, for 16 bits: 3e-6, 4e-7 and 1e-4.
template <bool kNarrow>
inline Tail tail_of(Vec v) {
  constexpr float kMax = 3.402823466e38f;  // infinity times a bell of zero would be NaN
  const Vec z = at_most(reinterpret_cast<Vec>(reinterpret_cast<VecU>(v) & 0x7fffffffu), kMax);
  constexpr float kHalfLog2E = 0.72134752044f, kRound = 12582912.0f;  // 1.5 * 2^23: its last bits hold an integer that is added
  const Vec power = at_least(v * v * -kHalfLog2E, -127.0f), shifted = power + kRound, f = power - (shifted - kRound);
  Vec exp2_f, s;
  Tail tail{z, {}, {}};
  if constexpr (kNarrow) {
    exp2_f = polynomial(f, {0.00958285299f, 0.0559064247f, 0.240240986f, 0.693124193f, 1.0f});
    s = 1.0f - reciprocal<kNarrow>(0.34f * z + 1.0f);
    tail.ratio = 0.5f - s * polynomial(s, {-0.10694257f, 0.199762354f, 0.22133621f, -0.98817039f, 1.17332077f});
  } else {
    exp2_f = polynomial(f, {0.00132647271f, 0.00967151265f, 0.0555073374f, 0.240222421f, 0.693146978f, 1.0f});
    s = 1.0f - reciprocal<kNarrow>(0.33f * z + 1.0f);
    tail.ratio = 0.5f - s * polynomial(s, {0.0465495417f, -0.099630055f, -0.0353165202f, 0.147851501f, 0.318541586f, -1.08679965f,
                                           1.20891638f});
  }
  tail.bell = reinterpret_cast<Vec>(reinterpret_cast<VecU>(exp2_f) + (reinterpret_cast<VecU>(shifted) << 23));
  return tail;
}

// v cdf(v) = max(v, 0) - z cdf(-z)
inline Vec gelu(Vec v, const Tail& at) { return at_least(v, 0.0f) - at.z * (at.bell * at.ratio); }

// cdf(v) + v density(v); for z it is one less what it is for -z
inline Vec gelu_slope(Vec v, const Tail& at) {
  constexpr float kInvSqrt2Pi = 0.39894228040f;
  const Vec left = at.bell * (at.ratio - kInvSqrt2Pi * at.z);
  return v < 0.0f ? left : 1.0f - left;
}

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
      part.store(y + i, gelu(v, tail_of<kNarrowTail<X, kBias>>(v)));
    });
  }
}

template <typename X, typename DY, bool kBias>
void backward(const BiasGeluBwd& args, int64_t begin, int64_t end) {
  const int64_t D = args.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    float* dbias = args.partial + unit * D;
    if (kBias) std::memset(dbias, 0, D * sizeof(float));
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
        const Tail at = tail_of<kNarrowTail<X, kBias>>(v);
        const Vec dx_i = part.load(dy + i) * gelu_slope(v, at);
        part.store(dx + i, dx_i);
        if constexpr (kBias) part.store(dbias + i, part.load(dbias + i) + dx_i);
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
  const BiasGeluFwd args{x.rows, bias.data, y.mutable_data_ptr(), x.D};
  run(MAEFAST_KERNEL(bias_gelu_fwd_kernel), args, x.count, x.D * 16);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bias_gelu_bwd(const Tensor& dy_in, const Tensor& x_in, const std::optional<Tensor>& bias_in,
                                                 bool with_y) {
  check_same_shape("dy", dy_in, x_in);
  const RowsInput dy("dy", dy_in), x("x", x_in);
  const FloatInput bias("bias", bias_in, x.D);
  Tensor dx = empty_cpu(x_in.sizes(), x_in.scalar_type());
  Tensor y = with_y ? empty_cpu(x_in.sizes(), x_in.scalar_type()) : empty_cpu({0}, x_in.scalar_type());
  RowSums sums(x.count, bias_in ? x.D : 0);
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
