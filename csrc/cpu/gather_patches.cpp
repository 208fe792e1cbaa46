// gather_patches: the kept patches, straight from the image, in conv-weight order (C, ph, pw).
#include "image.h"
#include "isa.h"

namespace maefast::cpu {

struct GatherPatches {
  Image imgs;
  const int64_t* ids;  // [N, K]
  void* out;           // [N, K, P]
  DType out_dtype;
  int64_t K;
};

namespace MAEFAST_ISA {
namespace {

template <typename In, typename Out>
void gather(const GatherPatches& args, int64_t begin, int64_t end) {
  Out* out = static_cast<Out*>(args.out) + begin * args.imgs.patch_values();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / args.K, next = unit + 1 < end && (unit + 1) / args.K == n ? args.ids[unit + 1] : -1;
    copy_patch<In>(args.imgs, n, args.ids[unit], next, out);
    out += args.imgs.patch_values();
  }
}

}  // namespace

// Units: kept patches.
void gather_patches_kernel(const GatherPatches& args, int64_t begin, int64_t end) {
  visit_pixel(args.imgs.dtype, [&](auto in) {
    visit_float(args.out_dtype, [&](auto out) { gather<decltype(in), decltype(out)>(args, begin, end); });
  });
}

}  // namespace MAEFAST_ISA

#ifdef MAEFAST_ENTRY
MAEFAST_DECLARE_KERNEL(gather_patches_kernel, GatherPatches)
#endif

}  // namespace maefast::cpu

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cpu {
namespace {

Tensor gather_patches_fwd(const Tensor& imgs, const Tensor& ids_in, int64_t patch_h, int64_t patch_w,
                          const std::optional<Tensor>& mean, const std::optional<Tensor>& std, ScalarType dtype) {
  const ImageInput input(imgs, patch_h, patch_w, mean, std);
  check(ids_in.dim() == 2 && ids_in.size(0) == imgs.size(0) && ids_in.scalar_type() == ScalarType::Long,
        "ids must be (N, K) int64 with the N of imgs");
  const Tensor ids = torch::stable::contiguous(ids_in);
  const int64_t N = ids.size(0), K = ids.size(1), L = input.image.patches(), P = input.image.patch_values();
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < N * K; ++i) {
    check(id[i] >= 0 && id[i] < L, "ids must be in [0, ", L, "), row ", i / K, " holds ", id[i]);
  }
  const DType out_dtype = float_dtype("dtype", dtype);
  Tensor out = empty_cpu({N, K, P}, dtype);
  const GatherPatches args{
      .imgs = input.image,
      .ids = id,
      .out = out.mutable_data_ptr(),
      .out_dtype = out_dtype,
      .K = K,
  };
  run(MAEFAST_KERNEL(gather_patches_kernel), args, N * K, P * 2 * item_size(dtype));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) { m.impl("gather_patches_fwd", TORCH_BOX(&gather_patches_fwd)); }

}  // namespace
}  // namespace maefast::cpu
#endif
