// random_masking on CUDA: one block counts the ranks of one row of noise.
#include "rank.cuh"

namespace maefast::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) random_masking_kernel(Masking a) {
  const int64_t n = blockIdx.x;
  rank_row(a.noise, n, a.L, shared<int>(), [&](int i, int rank) { store_rank(a, n, i, rank); });
}

}  // namespace
}  // namespace maefast::cuda

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> random_masking_fwd(const Tensor& noise, int64_t len_keep) {
  const Launch on(noise);
  const MaskingTensors masking(noise, len_keep);
  if (masking.mask.numel() > 0) {
    const auto error =
        launch(random_masking_kernel, dim3(masking.N), dim3(kThreads), rank_bytes(masking.args.L), on.stream, masking.args);
    check_launch("random_masking_fwd", error);
  }
  return {masking.ids_keep, masking.ids_restore, masking.mask};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CUDA, m) { m.impl("random_masking_fwd", TORCH_BOX(&random_masking_fwd)); }

}  // namespace
}  // namespace maefast::cuda
#endif
