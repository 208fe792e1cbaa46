// add_layer_norm: the residual added, and the sum normalised while it is in the cache.
#include <type_traits>

#include "isa.h"
#include "norm.h"

namespace maefast::cpu {

struct AddLayerNormFwd {
  Rows x, residual;
  void* sum;  // [rows, D], in the dtype of x and residual, fp32 where they differ
  Norm norm;
};

namespace MAEFAST_ISA {
namespace {

template <typename X, typename Residual, typename Y>
void forward(const AddLayerNormFwd& args, int64_t begin, int64_t end) {
  // Two different ones of fp32, bf16 and fp16 promote to fp32.
  using Sum = std::conditional_t<std::is_same_v<X, Residual>, X, float>;
  const int64_t D = args.norm.D;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = row_of<X>(args.x, row);
    const Residual* residual = row_of<Residual>(args.residual, row);
    Sum* sum = static_cast<Sum*>(args.sum) + row * D;
    for_row(D, [&](auto part, int64_t i) {
      prefetch(x + i, args.x.stride);
      prefetch(residual + i, args.residual.stride);
      part.store(sum + i, part.load(x + i) + part.load(residual + i));
    });
    norm_row<Sum, Y>(sum, args.norm, row);
  }
}

}  // namespace

// Units: rows.
void add_layer_norm_fwd_kernel(const AddLayerNormFwd& args, int64_t begin, int64_t end) {
  visit_float(args.x.dtype, [&](auto x) {
    visit_float(args.residual.dtype, [&](auto residual) {
      visit_float(args.norm.y_dtype, [&](auto y) { forward<decltype(x), decltype(residual), decltype(y)>(args, begin, end); });
    });
  });
}

}  // namespace MAEFAST_ISA

#ifdef MAEFAST_ENTRY
MAEFAST_DECLARE_KERNEL(add_layer_norm_fwd_kernel, AddLayerNormFwd)
#endif

}  // namespace maefast::cpu

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x_in, const Tensor& residual_in,
                                                              const Tensor& weight_in, const Tensor& bias_in, double eps,
                                                              ScalarType dtype) {
  check_same_shape("residual", residual_in, x_in);
  const RowsInput x("x", x_in), residual("residual", residual_in);
  const FloatInput weight("weight", weight_in, x.D), bias("bias", bias_in, x.D);
  const bool alike = x_in.scalar_type() == residual_in.scalar_type();
  Tensor sum = empty_cpu(x_in.sizes(), alike ? x_in.scalar_type() : ScalarType::Float);
  const DType y_dtype = float_dtype("dtype", dtype);
  Tensor y = empty_cpu(x_in.sizes(), dtype);
  Tensor center = empty_cpu({x.count}, ScalarType::Float), rstd = empty_cpu({x.count}, ScalarType::Float);
  const AddLayerNormFwd args{
      .x = x.rows,
      .residual = residual.rows,
      .sum = sum.mutable_data_ptr(),
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
  run(MAEFAST_KERNEL(add_layer_norm_fwd_kernel), args, x.count, x.D * 16);
  return {y, sum, center, rstd};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) { m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd)); }

}  // namespace
}  // namespace maefast::cpu
#endif
