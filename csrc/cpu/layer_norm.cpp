// layer_norm: rows normalised by their mean and variance; the backward pass also serves
// add_layer_norm.
#include "isa.h"
#include "norm.h"

namespace maefast::cpu {

struct LayerNormFwd {
  Rows x;
  Norm norm;
};

struct LayerNormBwd {
  Rows dy, dresidual, x;  // dresidual.data is null where there is none
  const float *weight, *bias, *center, *rstd;
  void *dx, *y, *dx_cast;  // [rows, D], dx in the dtype of x; y and dx_cast may be null
  DType y_dtype, cast_dtype;
  float* partial;  // [chunks, 2 or 3, D]: dweight, dbias, and dx summed if with_dx_sum
  bool with_dx_sum;
  int64_t rows, D, chunk;
};

namespace MAEFAST_ISA {
namespace {

template <typename Part>
inline Vec load_as(Part part, const Rows& rows, int64_t row, int64_t i) {
  Vec v;
  visit_float(rows.dtype, [&](auto value) { v = part.load(row_of<decltype(value)>(rows, row) + i); });
  return v;
}

template <typename Part>
MAEFAST_INLINE void store_as(Part part, void* out, DType dtype, int64_t i, Vec v) {
  visit_float(dtype, [&](auto value) { part.store(static_cast<decltype(value)*>(out) + i, v); });
}

template <typename X, typename DY>
inline void backward_row(const LayerNormBwd& args, int64_t row, float* partial) {
  const int64_t D = args.D;
  float *dweight = partial, *dbias = partial + D, *dx_sum = args.with_dx_sum ? partial + 2 * D : nullptr;
  const float width = static_cast<float>(D), rstd = args.rstd[row];
  const X* x = row_of<X>(args.x, row);
  const DY* dy = row_of<DY>(args.dy, row);
  const Vec center = broadcast(args.center[row]), scale = broadcast(rstd);
  const auto sums = sum_row<3>(D, [&](auto part, int64_t i, Vec* totals) {
    const Vec difference = part.keep(part.load(x + i) - center), g = part.load(dy + i) * part.load(args.weight + i);
    totals[0] += difference;
    totals[1] += g;
    totals[2] += g * difference;
  });
  const float residue = sums.of[0] / width;
  const Mean mean{center, broadcast(residue)};
  const Vec mean_g = broadcast(sums.of[1] / width);
  const Vec mean_gx = broadcast((sums.of[2] - residue * sums.of[1]) * rstd / width);  // of g xhat
  X* dx = static_cast<X*>(args.dx) + row * D;
  for_row(D, [&](auto part, int64_t i) {
    prefetch(x + i, args.x.stride);
    prefetch(dy + i, args.dy.stride);
    const Vec xhat = normalise(part.load(x + i), mean, scale), dy_i = part.load(dy + i), weight = part.load(args.weight + i);
    part.store(dweight + i, part.load(dweight + i) + dy_i * xhat);
    part.store(dbias + i, part.load(dbias + i) + dy_i);
    Vec dx_i = (dy_i * weight - mean_g - xhat * mean_gx) * scale;
    if (args.dresidual.data) dx_i += load_as(part, args.dresidual, row, i);
    if (dx_sum) part.store(dx_sum + i, part.load(dx_sum + i) + dx_i);
    part.store(dx + i, dx_i);
    if (args.dx_cast) store_as(part, args.dx_cast, args.cast_dtype, row * D + i, dx_i);
    if (args.y) store_as(part, args.y, args.y_dtype, row * D + i, xhat * weight + part.load(args.bias + i));
  });
}

template <typename X, typename DY>
void backward(const LayerNormBwd& args, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t width = (args.with_dx_sum ? 3 : 2) * args.D;
    float* partial = args.partial + unit * width;
    std::memset(partial, 0, width * sizeof(float));
    const int64_t first = unit * args.chunk, last = first + args.chunk < args.rows ? first + args.chunk : args.rows;
    for (int64_t row = first; row < last; ++row) backward_row<X, DY>(args, row, partial);
  }
}

}  // namespace

// Units: rows.
void layer_norm_fwd_kernel(const LayerNormFwd& args, int64_t begin, int64_t end) {
  visit_float(args.x.dtype, [&](auto x) {
    visit_float(args.norm.y_dtype, [&](auto y) {
      using X = decltype(x);
      for (int64_t row = begin; row < end; ++row) norm_row<X, decltype(y)>(row_of<X>(args.x, row), args.norm, row);
    });
  });
}

// Units: chunks of rows.
void layer_norm_bwd_kernel(const LayerNormBwd& args, int64_t begin, int64_t end) {
  visit_float(args.x.dtype, [&](auto x) {
    visit_float(args.dy.dtype, [&](auto dy) { backward<decltype(x), decltype(dy)>(args, begin, end); });
  });
}

}  // namespace MAEFAST_ISA

#ifdef MAEFAST_ENTRY
MAEFAST_DECLARE_KERNEL(layer_norm_fwd_kernel, LayerNormFwd)
MAEFAST_DECLARE_KERNEL(layer_norm_bwd_kernel, LayerNormBwd)
#endif

}  // namespace maefast::cpu

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, double eps,
                                                  ScalarType dtype) {
  const RowsInput x("x", x_in);
  const FloatInput weight("weight", weight_in, x.D), bias("bias", bias_in, x.D);
  const DType y_dtype = float_dtype("dtype", dtype);
  Tensor y = empty_cpu(x_in.sizes(), dtype);
  Tensor center = empty_cpu({x.count}, ScalarType::Float), rstd = empty_cpu({x.count}, ScalarType::Float);
  const LayerNormFwd args{
      .x = x.rows,
      .norm =
          {
              .weight = weight.data,
              .bias = bias.data,
              .eps = static_cast<float>(eps),
              .y = y.mutable_data_ptr(),
              .y_dtype = y_dtype,
              .center = static_cast<float*>(center.mutable_data_ptr()),
              .rstd = static_cast<float*>(rstd.mutable_data_ptr()),
              .D = x.D,
          },
  };
  run(MAEFAST_KERNEL(layer_norm_fwd_kernel), args, x.count, x.D * 8);
  return {y, center, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(
    const Tensor& dy_in, const std::optional<Tensor>& dresidual_in, const Tensor& x_in, const Tensor& weight_in,
    const Tensor& bias_in, const Tensor& center_in, const Tensor& rstd_in, std::optional<ScalarType> y_dtype,
    std::optional<ScalarType> cast_dtype, bool with_dx_sum) {
  const RowsInput x("x", x_in), dy("dy", dy_in);
  check_same_shape("dy", dy_in, x_in);
  std::optional<RowsInput> dresidual;
  if (dresidual_in) {
    check_same_shape("dresidual", *dresidual_in, x_in);
    dresidual.emplace("dresidual", *dresidual_in);
  }
  const int64_t D = x.D;
  const FloatInput weight("weight", weight_in, D), bias("bias", bias_in, D);
  const FloatInput center("center", center_in, x.count), rstd("rstd", rstd_in, x.count);
  const DType y_type = float_dtype("y_dtype", y_dtype.value_or(ScalarType::Float));
  const DType cast_type = float_dtype("cast_dtype", cast_dtype.value_or(ScalarType::Float));
  const auto output = [&](std::optional<ScalarType> dtype) {
    return dtype ? empty_cpu(x_in.sizes(), *dtype) : empty_cpu({0}, x_in.scalar_type());
  };
  Tensor dx = output(x_in.scalar_type()), y = output(y_dtype), dx_cast = output(cast_dtype);
  RowSums sums(x.count, (with_dx_sum ? 3 : 2) * D);
  const LayerNormBwd args{
      .dy = dy.rows,
      .dresidual = dresidual ? dresidual->rows : Rows{nullptr, DType::f32, 0},
      .x = x.rows,
      .weight = weight.data,
      .bias = bias.data,
      .center = center.data,
      .rstd = rstd.data,
      .dx = dx.mutable_data_ptr(),
      .y = y_dtype ? y.mutable_data_ptr() : nullptr,
      .dx_cast = cast_dtype ? dx_cast.mutable_data_ptr() : nullptr,
      .y_dtype = y_type,
      .cast_dtype = cast_type,
      .partial = sums.partial(),
      .with_dx_sum = with_dx_sum,
      .rows = x.count,
      .D = D,
      .chunk = sums.chunk,
  };
  run(MAEFAST_KERNEL(layer_norm_bwd_kernel), args, sums.chunks, sums.chunk * D * 12);
  return {dx, sums.total(0, D), sums.total(D, D), y, dx_cast, sums.total(2 * D, with_dx_sum ? D : 0)};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}

}  // namespace
}  // namespace maefast::cpu
#endif
