// linear: a matrix product with bias by oneDNN, in fp32 twice as fast on AMD as the product that torch takes there; an exact GELU
// in its epilogue. torch keeps oneDNN to itself, so the call goes through the dispatcher.
#include "isa.h"
#include "vec.h"

#ifdef MAEFAST_ENTRY
#include <string>

#include "entry.h"

namespace maefast::cpu {
namespace {

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu) {
  check(weight.dim() == 2 && x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), "x must be (..., in) for a weight (out, in)");
  check(x.scalar_type() == weight.scalar_type(), "x must have the dtype of weight");
  check(!bias || (bias->numel() == weight.size(0) && bias->scalar_type() == weight.scalar_type()),
        "bias must be (out,) in the dtype of weight");
  // The GELU algorithm "none" is the exact one, by erf.
  return call_op("mkldnn::_linear_pointwise", x, weight, bias, std::string(gelu ? "gelu" : "none"), std::vector<double>{},
                 std::optional<std::string>(gelu ? "none" : ""));
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) { m.impl("linear_fwd", TORCH_BOX(&linear_fwd)); }

}  // namespace
}  // namespace maefast::cpu
#endif
