// gather_patches on CUDA, and mask_patches, which first ranks the noise: the kept patches, straight
// from the image, in conv-weight order (C, ph, pw). A block copies some kept patches of one sample,
// kUnit neighbouring pixels at a time.
#include <algorithm>

#include "image.cuh"
#include "rank.cuh"

namespace maefast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kEnoughBlocks = 2048;  // to fill a large GPU twice

struct GatherPatches {
  Image imgs;
  const int64_t* ids;  // [N, K]; null where `masking` decides
  Masking masking;
  void* out;                            // [N, K, P]
  int K, rows;                          // of a sample; of a block
  Divisor by_blocks;                    // of a sample
  Divisor by_patch, by_row, by_height;  // units of a patch, of a row of pixels; rows of a channel
};

template <typename In, typename Out, int kUnit>
__global__ void __launch_bounds__(kThreads) gather_patches_kernel(GatherPatches a) {
  const int64_t n = a.by_blocks.quotient(blockIdx.x);
  const int block = blockIdx.x - static_cast<int>(n) * a.by_blocks.value;
  const int first = block * a.rows, rows = min(a.rows, a.K - first);
  int* ids = shared<int>();
  if (a.ids == nullptr) {
    int* keys = ids + (a.rows + 3) / 4 * 4;
    rank_row(a.masking.noise, n, a.masking.L, keys, [&](int i, int rank) {
      if (block == 0) store_rank(a.masking, n, i, rank);
      if (rank >= first && rank < first + rows) ids[rank - first] = i;
    });
  } else {
    for (int r = threadIdx.x; r < rows; r += kThreads) {
      const int64_t id = a.ids[n * a.K + first + r];
      ids[r] = id >= 0 && id < a.imgs.patches() ? static_cast<int>(id) : -1;  // -1: zeros
    }
  }
  __syncthreads();

  const In* imgs = static_cast<const In*>(a.imgs.data);
  Out* out = static_cast<Out*>(a.out) + (n * a.K + first) * a.imgs.patch_values();
#pragma unroll 4
  for (int unit = threadIdx.x; unit < rows * a.by_patch.value; unit += kThreads) {
    const int row = a.by_patch.quotient(unit), within = unit - row * a.by_patch.value;
    const int line = a.by_row.quotient(within), x = (within - line * a.by_row.value) * kUnit;
    const int c = a.by_height.quotient(line), y = line - c * a.by_height.value;
    Pack<Out, kUnit> values = {};
    if (const int patch = ids[row]; patch >= 0) {
      const In* from = imgs + a.imgs.corner(n, patch) + c * a.imgs.stride_c + y * a.imgs.stride_h + x * a.imgs.stride_w;
      const Pack<In, kUnit> pixels = load<kUnit>(from);
      if constexpr (std::is_same_v<In, Out>) {
        values = pixels;
      } else {
        const Normalisation normalise(a.imgs, c);
#pragma unroll
        for (int e = 0; e < kUnit; ++e) values.value[e] = from_float<Out>(normalise(pixels.value[e]));
      }
    }
    store<kUnit>(out + static_cast<int64_t>(unit) * kUnit, values);
  }
}

// Returns the longest unit that divides rows of pixels and whose accesses are aligned.
int choose_unit(const Image& a, int64_t item) {
  const int lengths[] = {a.dtype == DType::u8 ? 16 : 8, 2};
  for (const int unit : lengths) {
    const int64_t bytes = std::min<int64_t>(16, unit * item);
    const bool dense = a.stride_w == 1 && a.patch_w % unit == 0;
    if (dense && is_aligned(a.data, bytes, a.stride_n * item, a.stride_c * item, a.stride_h * item)) return unit;
  }
  return 1;
}

template <typename In, typename Out, int kUnit>
cudaError_t start(GatherPatches a, int64_t N, cudaStream_t stream) {
  constexpr int kMostRows = 2048;      // of a block: their ids take 8 KiB of shared memory
  constexpr int kMostUnits = 1 << 30;  // of a block: 32-bit indices
  const int units = a.imgs.patch_values() / kUnit;
  const int64_t blocks_wanted = std::max<int64_t>(1, kEnoughBlocks / N);
  a.rows = static_cast<int>(std::min<int64_t>({divide_up(a.K, blocks_wanted), kMostRows, std::max(1, kMostUnits / units)}));
  const int64_t blocks = a.K > 0 ? divide_up(a.K, a.rows) : 1;
  a.by_blocks = Divisor(static_cast<int>(blocks));
  a.by_row = Divisor(a.imgs.patch_w / kUnit);
  a.by_height = Divisor(a.imgs.patch_h);
  a.by_patch = Divisor(units);
  const size_t bytes = (a.rows + 3) / 4 * 4 * sizeof(int) + (a.ids == nullptr ? rank_bytes(a.masking.L) : 0);
  return launch(gather_patches_kernel<In, Out, kUnit>, dim3(N * blocks), dim3(kThreads), bytes, stream, a);
}

template <typename In, typename Out>
cudaError_t start_unit(const GatherPatches& a, int64_t N, cudaStream_t stream) {
  constexpr int kLong = std::is_same_v<In, U8> ? 16 : 8;
  const int unit = choose_unit(a.imgs, sizeof(In));
  if (unit == kLong) return start<In, Out, kLong>(a, N, stream);
  return unit == 2 ? start<In, Out, 2>(a, N, stream) : start<In, Out, 1>(a, N, stream);
}

cudaError_t gather_patches(const GatherPatches& a, DType out, int64_t N, cudaStream_t stream) {
  return visit_pixel(a.imgs.dtype, [&](auto in) {
    return visit_float(out, [&](auto value) { return start_unit<decltype(in), decltype(value)>(a, N, stream); });
  });
}

}  // namespace
}  // namespace maefast::cuda

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cuda {
namespace {

Tensor gather_patches_fwd(const Tensor& imgs, const Tensor& ids_in, int64_t patch_h, int64_t patch_w, const OptionalTensor& mean,
                          const OptionalTensor& std, ScalarType dtype) {
  const Launch on(imgs);
  const ImageInput input(imgs, patch_h, patch_w, mean, std);
  check(ids_in.dim() == 2 && ids_in.size(0) == imgs.size(0) && ids_in.scalar_type() == ScalarType::Long,
        "ids must be (N, K) int64 with the N of imgs");
  check_same_gpu("ids", ids_in, imgs);
  const Tensor ids = torch::stable::contiguous(ids_in);
  const int64_t N = ids.size(0), K = ids.size(1), sizes[] = {N, K, input.image.patch_values()};
  Tensor out = torch::stable::new_empty(imgs, {sizes, 3}, dtype);
  if (out.numel() > 0) {
    const GatherPatches args{
        .imgs = input.image,
        .ids = static_cast<const int64_t*>(ids.const_data_ptr()),
        .out = out.mutable_data_ptr(),
        .K = narrow("K", K),
    };
    check_launch("gather_patches_fwd", gather_patches(args, float_dtype("dtype", dtype), narrow("N", N), on.stream));
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_patches_fwd(const Tensor& imgs, const Tensor& noise, int64_t len_keep,
                                                            int64_t patch_h, int64_t patch_w, const OptionalTensor& mean,
                                                            const OptionalTensor& std, ScalarType dtype) {
  const Launch on(imgs);
  const ImageInput input(imgs, patch_h, patch_w, mean, std);
  check_same_gpu("noise", noise, imgs);
  const MaskingTensors masking(noise, len_keep);
  check(masking.N == imgs.size(0) && masking.args.L == input.image.patches(), "noise must be (N, L) with the patches of imgs");
  check(imgs.size(1) > 0, "imgs must have a channel");
  const int64_t sizes[] = {masking.N, len_keep, input.image.patch_values()};
  Tensor out = torch::stable::new_empty(imgs, {sizes, 3}, dtype);
  if (masking.mask.numel() > 0) {
    const GatherPatches args{
        .imgs = input.image,
        .ids = nullptr,
        .masking = masking.args,
        .out = out.mutable_data_ptr(),
        .K = static_cast<int>(len_keep),
    };
    check_launch("mask_patches_fwd", gather_patches(args, float_dtype("dtype", dtype), masking.N, on.stream));
  }
  return {out, masking.ids_keep, masking.ids_restore, masking.mask};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CUDA, m) {
  m.impl("gather_patches_fwd", TORCH_BOX(&gather_patches_fwd));
  m.impl("mask_patches_fwd", TORCH_BOX(&mask_patches_fwd));
}

}  // namespace
}  // namespace maefast::cuda
#endif
