// The boxed entries of the products in multiply.h: tensors in, operands that TMA can read out.
#include <vector>

#include "../entry.h"
#include "multiply.h"

namespace maefast::cuda::gemm {
namespace {

bool is_16_bit(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

// A tensor (..., D) as rows that TMA reads: itself where they lie so, else a contiguous copy.
class Rows {
 public:
  Operand operand;
  int count, D;

  Rows(const char* name, const Tensor& t) : tensor_(t) {
    check(t.dim() >= 1, name, " must be (..., D), it has no dimension");
    D = narrow(name, t.size(t.dim() - 1));
    check(D > 0 && D % kMultiple == 0, "the last dimension of ", name, " must be a positive multiple of ", kMultiple, ", it is ",
          D);
    count = narrow(name, t.numel() / D);
    std::optional<int64_t> stride = row_stride(t);
    if (!stride) {
      tensor_ = packed(t);
      stride = D;
    }
    operand = {tensor_.const_data_ptr(), *stride};
  }

 private:
  // From row to row of `t`, in values; nothing where TMA cannot step through them.
  static std::optional<int64_t> row_stride(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    if (t.stride(last) != 1 || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) return std::nullopt;
    int64_t stride = t.size(last), span = 0;  // from one index to the next of the dimension outside those seen
    for (int64_t dim = last - 1; dim >= 0; --dim) {
      if (t.size(dim) == 1) continue;
      if (span == 0) stride = t.stride(dim);
      if (span != 0 && t.stride(dim) != span) return std::nullopt;
      span = t.stride(dim) * t.size(dim);
    }
    return stride >= t.size(last) && stride % kMultiple == 0 ? std::optional(stride) : std::nullopt;
  }

  Tensor tensor_;
};

// The fp32 values that a bias is added as.
class Bias {
 public:
  const float* data = nullptr;

  Bias(const OptionalTensor& bias, const Tensor& x, int64_t features) {
    if (!bias) return;
    check(bias->dim() == 1 && bias->size(0) == features, "bias must be (out,) = (", features, ",)");
    check(bias->scalar_type() == ScalarType::Float || bias->scalar_type() == x.scalar_type(),
          "bias must be float32 or have the dtype of x");
    check_same_gpu("bias", *bias, x);
    tensor_ = packed(torch::stable::to(*bias, ScalarType::Float));
    data = static_cast<const float*>(tensor_->const_data_ptr());
  }

 private:
  OptionalTensor tensor_;
};

void check_matrix(const Tensor& x, const Tensor& weight, int64_t depth_of_weight) {
  check(is_16_bit(x.scalar_type()), "x must be bfloat16 or float16 for the products on a GPU");
  check(weight.dim() == 2 && x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(depth_of_weight),
        "x must be (..., in) for a weight (out, in)");
  check(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  check_same_gpu("weight", weight, x);
}

int attribute(cudaDeviceAttr name, const Tensor& x) {
  int value = 0;
  check_launch("linear", cudaDeviceGetAttribute(&value, name, x.get_device_index()));
  return value;
}

Tensor empty_rows(const Tensor& x, int64_t features) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = features;
  return torch::stable::new_empty(x, {sizes.data(), sizes.size()});
}

// Fills in x, weight and the sizes of `args` and launches the product, unless there are no rows.
template <Epilogue epilogue>
void run(Multiply args, const Tensor& x_in, const Tensor& weight_in) {
  const Launch launch(x_in);
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, x_in),
            minor = attribute(cudaDevAttrComputeCapabilityMinor, x_in);
  check(major == 9 && minor == 0, "the products of csrc/cuda/gemm need compute capability 9.0, the GPU has ", major, ".", minor);
  const Rows x("x", x_in), weight("weight", weight_in);
  constexpr bool kForward = epilogue == Epilogue::bias || epilogue == Epilogue::gelu;
  args.x = x.operand;
  args.weight = weight.operand;
  args.rows = x.count;
  args.depth = x.D;
  args.features = kForward ? weight.count : weight.D;
  args.processors = attribute(cudaDevAttrMultiProcessorCount, x_in);
  check(args.features % kMultiple == 0, "the features that a weight gives must be a multiple of ", kMultiple, ", they are ",
        args.features);
  if (args.rows == 0 || args.features == 0) return;
  const bool bf16 = x_in.scalar_type() == ScalarType::BFloat16;
  const cudaError_t error =
      bf16 ? multiply<epilogue, DType::bf16>(args, launch.stream) : multiply<epilogue, DType::f16>(args, launch.stream);
  if (error != cudaSuccess) cudaGetLastError();  // reported here, not by whoever asks next
  check_launch("linear", error);
}

using Pair = std::tuple<Tensor, Tensor>;

Pair linear_gelu_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_matrix(x, weight, 1);
  const Bias values(bias, x, weight.size(0));
  Tensor y = empty_rows(x, weight.size(0)), hidden = empty_rows(x, weight.size(0));
  run<Epilogue::gelu>({.bias = values.data, .y = y.mutable_data_ptr(), .hidden = hidden.mutable_data_ptr()}, x, weight);
  return {y, hidden};
}

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu, std::optional<ScalarType> dtype) {
  check_matrix(x, weight, 1);
  check(!dtype || *dtype == x.scalar_type(), "dtype must be that of x on a GPU");
  if (gelu) return std::get<0>(linear_gelu_fwd(x, weight, bias));
  const Bias values(bias, x, weight.size(0));
  Tensor y = empty_rows(x, weight.size(0));
  const Multiply args{.bias = values.data, .y = y.mutable_data_ptr()};
  if (!bias && weight.stride(0) == 1 && weight.stride(1) != 1) {
    run<Epilogue::none>(args, x, torch::stable::transpose(weight, 0, 1));
  } else {
    run<Epilogue::bias>(args, x, weight);
  }
  return y;
}

Pair linear_gelu_bwd(const Tensor& dy, const Tensor& weight, const Tensor& hidden_in, bool with_sum) {
  check_matrix(dy, weight, 0);
  const int64_t features = weight.size(1), rows = dy.numel() / std::max<int64_t>(1, weight.size(0)), none[] = {0};
  check(hidden_in.dim() >= 1 && hidden_in.size(hidden_in.dim() - 1) == features && hidden_in.numel() == rows * features,
        "hidden must be (..., in) for a weight (out, in), with the rows of dy");
  check(hidden_in.scalar_type() == dy.scalar_type(), "hidden must have the dtype of dy");
  check_same_gpu("hidden", hidden_in, dy);
  const Tensor hidden = packed(hidden_in);
  Tensor dhidden = empty_rows(dy, features), dhidden_sum = torch::stable::new_empty(dy, {none, 1}, ScalarType::Float);
  OptionalTensor sums;
  if (with_sum) {
    const int64_t tiles[] = {divide_up(rows, kTileSide), divide_up(features, kTileSide) * kTileSide};
    sums = torch::stable::new_empty(dy, {tiles, 2}, ScalarType::Float);
  }
  run<Epilogue::gelu_slope>({.y = dhidden.mutable_data_ptr(),
                             .hidden = const_cast<void*>(hidden.const_data_ptr()),
                             .sums = sums ? static_cast<float*>(sums->mutable_data_ptr()) : nullptr},
                            dy, weight);
  if (sums) {
    const int64_t over[] = {0};
    Tensor inside = torch::stable::narrow(*sums, 1, 0, features);
    dhidden_sum = torch::stable::sum(inside, IntHeaderOnlyArrayRef(over, 1), false, ScalarType::Float);
  }
  return {dhidden, dhidden_sum};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CUDA, m) {
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("linear_gelu_fwd", TORCH_BOX(&linear_gelu_fwd));
  m.impl("linear_gelu_bwd", TORCH_BOX(&linear_gelu_bwd));
}

}  // namespace
}  // namespace maefast::cuda::gemm
