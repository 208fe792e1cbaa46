// masked_mse on CUDA: a warp holds one patch of the image at a time in shared memory, in the order
// of pred; the target is never stored elsewhere. Patches of weight zero are not read. The loss is
// summed per block, then over the blocks by a second kernel.
#include <algorithm>

#include "image.cuh"

namespace maefast::cuda {
namespace {

constexpr int kMostWarps = 4;                                   // of a block
constexpr int kBlocksPerSM = 8;                                 // at least: 64 registers a thread
constexpr int kSharedBytes = 48 << 10;                          // of a block, without an attribute
constexpr int kMostValues = kSharedBytes / 4 - 4 * kMostWarps;  // of a patch
constexpr float kVarEps = 1e-6f;                                // inside the root

struct MaskedMse {
  Image imgs;
  const void* pred;  // [N, L or M, P]
  int64_t pred_stride_n, pred_stride_l;
  const float* mask;  // [N, L]
  int L, M;
  bool norm_pix;
  float inverse_P, inverse_degrees;  // 1 / P, 1 / (P - 1)
  bool whole_units;                  // pred can be read kUnit values at a time
  int warps, patches;                // of a block; of a warp
  Divisor by_groups;                 // blocks of a sample
  Divisor by_row;                    // pixels of a row of the patch
  float* partial;                    // forward: [2, blocks], errors and weights
  const float *dloss, *sum_mask;     // backward: []
  void* dpred;                       // backward: [N, L or M, P]
};

constexpr int kUnit = 8;

__host__ __device__ inline int padded(int values) { return (values + 3) / 4 * 4; }

// The target of a patch in `target`, shared memory of one warp, in the order of pred: (ph, pw, C).
template <typename In>
__device__ inline void read_target(const MaskedMse& a, int64_t n, int patch, float* target) {
  const int lane = threadIdx.x % kWarp, P = a.imgs.patch_values(), C = a.imgs.channels, pixels = P / C;
  const In* corner = static_cast<const In*>(a.imgs.data) + a.imgs.corner(n, patch);
  __syncwarp();  // others may still read the patch before
  float sum = 0.0f;
  for (int c = 0; c < C; ++c) {
    const Normalisation normalise(a.imgs, c);
#pragma unroll 8
    for (int pixel = lane; pixel < pixels; pixel += kWarp) {
      const int y = a.by_row.quotient(pixel), x = pixel - y * a.by_row.value;
      const float value = normalise(corner[c * a.imgs.stride_c + y * a.imgs.stride_h + x * a.imgs.stride_w]);
      target[pixel * C + c] = value;
      sum += value;
    }
  }
  __syncwarp();
  if (!a.norm_pix) return;
  const float mean = warp_sum(sum) * a.inverse_P;
  float squares = 0.0f;
  for (int i = lane; i < P; i += kWarp) squares += (target[i] - mean) * (target[i] - mean);
  const float var = warp_sum(squares) * a.inverse_degrees + kVarEps, approximate = rsqrtf(var);
  const float rstd = approximate * (1.5f - 0.5f * var * approximate * approximate);  // exact roots are calls
  for (int i = lane; i < P; i += kWarp) target[i] = (target[i] - mean) * rstd;
  __syncwarp();
}

// The number of weights[:patch] that are not zero: the row of this patch in a pred of removed
// patches.
__device__ inline int count_removed_before(const float* weights, int patch) {
  int count = 0;
  for (int i = threadIdx.x % kWarp; i < patch; i += kWarp) count += weights[i] != 0.0f;
  return warp_sum(count);
}

// Calls body(n, i, row, weight) for each patch i of this warp and the row of pred that it has, -1
// for none.
template <typename Body>
__device__ inline void for_patches(const MaskedMse& a, Body&& body) {
  const int64_t n = a.by_groups.quotient(blockIdx.x);
  const int group = blockIdx.x - static_cast<int>(n) * a.by_groups.value, warp = threadIdx.x / kWarp;
  const int first = (group * a.warps + warp) * a.patches, end = min(first + a.patches, a.L);
  const float* weights = a.mask + n * a.L;
  const bool compact = a.M < a.L;
  int row = compact && first < end ? count_removed_before(weights, first) : first;
  for (int i = first; i < end; ++i) {
    const float weight = weights[i];
    const bool has_row = (!compact || weight != 0.0f) && row < a.M;
    body(n, i, has_row ? row : -1, weight);
    row += !compact || weight != 0.0f;
  }
}

template <typename T>
__device__ inline const T* row_of(const void* pred, const MaskedMse& a, int64_t n, int row) {
  return static_cast<const T*>(pred) + n * a.pred_stride_n + row * a.pred_stride_l;
}

template <typename T, typename In>
__global__ void __launch_bounds__(kMostWarps* kWarp, kBlocksPerSM) masked_mse_fwd_kernel(MaskedMse a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, P = a.imgs.patch_values();
  float* target = shared<float>() + warp * padded(P);
  float total = 0.0f, weights = 0.0f;  // total: of this lane
  for_patches(a, [&](int64_t n, int i, int row, float weight) {
    weights += weight;
    if (weight == 0.0f || row < 0) return;
    read_target<In>(a, n, i, target);
    const T* pred = row_of<T>(a.pred, a, n, row);
    float error = 0.0f;
    if (a.whole_units) {
#pragma unroll(sizeof(T) == 4 ? 3 : 4)
      for (int p = lane * kUnit; p < P; p += kWarp * kUnit) {
        const auto guess = load<kUnit>(pred + p);
        const auto truth = load<kUnit>(target + p);
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
          const float difference = to_float(guess.value[e]) - truth.value[e];
          error += difference * difference;
        }
      }
    } else {
      for (int p = lane; p < P; p += kWarp) {
        const float difference = to_float(pred[p]) - target[p];
        error += difference * difference;
      }
    }
    total += weight * error;
  });
  float* sums = shared<float>() + a.warps * padded(P);  // [2, warps]
  total = warp_sum(total);
  if (lane == 0) {
    sums[warp] = total;
    sums[a.warps + warp] = weights;
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  float sum = 0.0f;
  for (int w = 0; w < a.warps; ++w) sum += sums[threadIdx.x * a.warps + w];
  a.partial[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = sum;
}

struct MaskedMseSum {
  const float* partial;  // [2, blocks]
  float* loss;           // []
  int blocks, P;
};

constexpr int kSumThreads = 1024;

__global__ void __launch_bounds__(kSumThreads) masked_mse_sum_kernel(MaskedMseSum a) {
  float total = 0.0f, weight = 0.0f;
#pragma unroll 4
  for (int b = threadIdx.x; b < a.blocks; b += kSumThreads) {
    total += a.partial[b];
    weight += a.partial[static_cast<int64_t>(a.blocks) + b];
  }
  total = warp_sum(total);
  weight = warp_sum(weight);
  constexpr int kWarps = kSumThreads / kWarp;
  float* sums = shared<float>();  // [2, kWarps]
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = total;
    sums[kWarps + threadIdx.x / kWarp] = weight;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  static_assert(kWarps == kWarp);
  total = warp_sum(sums[threadIdx.x]);
  weight = warp_sum(sums[kWarps + threadIdx.x]);
  if (threadIdx.x == 0) *a.loss = total / (weight * a.P);
}

template <typename T, typename In>
__global__ void __launch_bounds__(kMostWarps* kWarp, kBlocksPerSM) masked_mse_bwd_kernel(MaskedMse a) {
  const int lane = threadIdx.x % kWarp, P = a.imgs.patch_values();
  float* target = shared<float>() + threadIdx.x / kWarp * padded(P);
  const float scale = *a.dloss * 2.0f / (*a.sum_mask * P);
  const auto out_row = [&](int64_t n, int row) { return static_cast<T*>(a.dpred) + (n * a.M + row) * P; };
  const auto clear = [&](T* row) {
    if (a.whole_units) {
      for (int p = lane * kUnit; p < P; p += kWarp * kUnit) store<kUnit>(row + p, Pack<T, kUnit>{});
    } else {
      for (int p = lane; p < P; p += kWarp) row[p] = from_float<T>(0.0f);
    }
  };
  for_patches(a, [&](int64_t n, int i, int row, float weight) {
    if (weight == 0.0f || row < 0) {
      if (row >= 0) clear(out_row(n, row));
      return;
    }
    read_target<In>(a, n, i, target);
    const T* pred = row_of<T>(a.pred, a, n, row);
    T* dpred = out_row(n, row);
    if (a.whole_units) {
#pragma unroll 4
      for (int p = lane * kUnit; p < P; p += kWarp * kUnit) {
        const auto guess = load<kUnit>(pred + p);
        const auto truth = load<kUnit>(target + p);
        Pack<T, kUnit> gradient;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
          gradient.value[e] = from_float<T>((to_float(guess.value[e]) - truth.value[e]) * (scale * weight));
        }
        store<kUnit>(dpred + p, gradient);
      }
    } else {
      for (int p = lane; p < P; p += kWarp) dpred[p] = from_float<T>((to_float(pred[p]) - target[p]) * (scale * weight));
    }
  });
  // A mask that removes fewer than M leaves rows that belong to no patch.
  const int64_t n = a.by_groups.quotient(blockIdx.x);
  if (a.M == a.L || static_cast<int64_t>(blockIdx.x) + 1 != (n + 1) * a.by_groups.value || threadIdx.x >= kWarp) return;
  for (int row = count_removed_before(a.mask + n * a.L, a.L); row < a.M; ++row) clear(out_row(n, row));
}

// Sets the sizes of the launch from the shape only, so that the order of the sum depends on nothing
// else.
int64_t set_sizes(MaskedMse& a, int64_t N) {
  const int values = padded(a.imgs.patch_values());
  a.warps = std::clamp((kSharedBytes / 4 - 2 * kMostWarps) / values, 1, kMostWarps);
  a.patches = static_cast<int>(std::clamp<int64_t>(N * a.L / 8192, 1, 8));
  a.by_groups = Divisor(static_cast<int>(divide_up(a.L, a.warps * a.patches)));
  a.by_row = Divisor(a.imgs.patch_w);
  return N * a.by_groups.value;
}

size_t shared_bytes(const MaskedMse& a) { return (a.warps * padded(a.imgs.patch_values()) + 2 * a.warps) * sizeof(float); }

template <typename Body>
cudaError_t visit_types(DType pred, DType pixel, Body&& body) {
  return visit_float(pred, [&](auto t) { return visit_pixel(pixel, [&](auto in) { return body(t, in); }); });
}

}  // namespace
}  // namespace maefast::cuda

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cuda {
namespace {

// What forward and backward share: the checked inputs.
struct MaskedMseInput {
  ImageInput imgs;
  Tensor pred, mask;
  int64_t N, blocks = 0;
  MaskedMse args;

  MaskedMseInput(const Tensor& pred_in, const Tensor& imgs_in, const Tensor& mask_in, int64_t patch_h, int64_t patch_w,
                 bool norm_pix, const OptionalTensor& mean, const OptionalTensor& std)
      : imgs(imgs_in, patch_h, patch_w, mean, std), pred(pred_in), mask(mask_in), N(imgs_in.size(0)), args{.imgs = imgs.image} {
    const int64_t L = imgs.image.patches(), P = imgs.image.patch_values();
    check(mask.dim() == 2 && mask.size(0) == N && mask.size(1) == L && mask.scalar_type() == ScalarType::Float,
          "mask must be (N, L) float32 with the patches of imgs");
    check(pred.dim() == 3 && pred.size(0) == N && pred.size(1) >= 1 && pred.size(1) <= L && pred.size(2) == P,
          "pred must be (N, M, ", P, ") with 1 <= M <= L");
    check(P >= (norm_pix ? 2 : 1), "patches must have ", norm_pix ? "two values to be normalised" : "a value");
    check(P <= kMostValues, "masked_mse on a GPU holds patches of up to ", kMostValues, " values, these have ", P);
    check_same_gpu("pred", pred, imgs_in);
    check_same_gpu("mask", mask, imgs_in);
    pred = dense_rows(pred);
    mask = torch::stable::contiguous(mask);
    args.pred = pred.const_data_ptr();
    args.pred_stride_n = pred.stride(0);
    args.pred_stride_l = pred.stride(1);
    args.mask = static_cast<const float*>(mask.const_data_ptr());
    args.L = static_cast<int>(L);
    args.M = static_cast<int>(pred.size(1));
    args.norm_pix = norm_pix;
    args.inverse_P = 1.0f / static_cast<float>(P);
    args.inverse_degrees = norm_pix ? 1.0f / static_cast<float>(P - 1) : 0.0f;
    const int64_t item = item_size(pred.scalar_type());
    args.whole_units = P % kUnit == 0 && is_aligned(args.pred, 16, args.pred_stride_n * item, args.pred_stride_l * item);
    if (N > 0) blocks = narrow("the number of blocks", set_sizes(args, N));
  }
  DType dtype() const { return float_dtype("pred", pred.scalar_type()); }
};

Tensor masked_mse_fwd(const Tensor& pred, const Tensor& imgs, const Tensor& mask, int64_t patch_h, int64_t patch_w, bool norm_pix,
                      const OptionalTensor& mean, const OptionalTensor& std) {
  const Launch on(imgs);
  MaskedMseInput input(pred, imgs, mask, patch_h, patch_w, norm_pix, mean, std);
  Tensor loss = torch::stable::new_empty(imgs, IntHeaderOnlyArrayRef(), ScalarType::Float);
  const int64_t sizes[] = {2, input.blocks};
  const Tensor partial = torch::stable::new_empty(imgs, {sizes, 2}, ScalarType::Float);
  input.args.partial = static_cast<float*>(partial.mutable_data_ptr());
  cudaError_t error = cudaSuccess;
  if (input.blocks > 0) {
    error = visit_types(input.dtype(), input.args.imgs.dtype, [&](auto t, auto in) {
      return launch(masked_mse_fwd_kernel<decltype(t), decltype(in)>, dim3(input.blocks), dim3(input.args.warps * kWarp),
                    shared_bytes(input.args), on.stream, input.args);
    });
  }
  check_launch("masked_mse_fwd", error);
  const MaskedMseSum sum{
      .partial = input.args.partial,
      .loss = static_cast<float*>(loss.mutable_data_ptr()),
      .blocks = static_cast<int>(input.blocks),
      .P = input.args.imgs.patch_values(),
  };
  check_launch("masked_mse_fwd",
               launch(masked_mse_sum_kernel, dim3(1), dim3(kSumThreads), 2 * kWarp * sizeof(float), on.stream, sum));
  return loss;
}

Tensor masked_mse_bwd(const Tensor& dloss_in, const Tensor& pred, const Tensor& imgs, const Tensor& mask, int64_t patch_h,
                      int64_t patch_w, bool norm_pix, const OptionalTensor& mean, const OptionalTensor& std) {
  const Launch on(imgs);
  MaskedMseInput input(pred, imgs, mask, patch_h, patch_w, norm_pix, mean, std);
  check(dloss_in.numel() == 1 && dloss_in.scalar_type() == ScalarType::Float, "dloss must be one float32 value");
  check_same_gpu("dloss", dloss_in, imgs);
  Tensor dpred = torch::stable::new_empty(pred, pred.sizes());
  if (input.blocks == 0) return dpred;
  const Tensor dloss = torch::stable::contiguous(dloss_in), sum_mask = torch::stable::sum(input.mask);
  input.args.dloss = static_cast<const float*>(dloss.const_data_ptr());
  input.args.sum_mask = static_cast<const float*>(sum_mask.const_data_ptr());
  input.args.dpred = dpred.mutable_data_ptr();
  const cudaError_t error = visit_types(input.dtype(), input.args.imgs.dtype, [&](auto t, auto in) {
    return launch(masked_mse_bwd_kernel<decltype(t), decltype(in)>, dim3(input.blocks), dim3(input.args.warps * kWarp),
                  shared_bytes(input.args), on.stream, input.args);
  });
  check_launch("masked_mse_bwd", error);
  return dpred;
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CUDA, m) {
  m.impl("masked_mse_fwd", TORCH_BOX(&masked_mse_fwd));
  m.impl("masked_mse_bwd", TORCH_BOX(&masked_mse_bwd));
}

}  // namespace
}  // namespace maefast::cuda
#endif
