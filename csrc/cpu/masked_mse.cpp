// masked_mse: the error of the predicted patches against the pixels of the image. The target exists
// one patch at a time, in cache.
#include "image.h"
#include "isa.h"

namespace maefast::cpu {

struct MaskedMse {
  Image imgs;
  const void* pred;  // [N, L, P] or [N, M, P], rows dense, channel-fastest
  DType pred_dtype;
  int64_t pred_stride_n, pred_stride_l;
  const float* mask;   // [N, L]
  const int32_t* row;  // [N, L]: the patch's row of pred, -1 where the weight is zero
  bool norm_pix;
  float* patch_loss = nullptr;  // forward: [N, L]
  void* dpred = nullptr;        // backward: [N, rows, P]
  int64_t rows;
  bool streaming = false;
  float scale = 0.0f;  // backward: dloss * 2 / (P * sum(mask))
};

namespace MAEFAST_ISA {
namespace {

constexpr float kVarEps = 1e-6f;

constexpr int64_t kRun = 32;  // terms; short chains of sums round better

// Sum over a dense row of term(values), in runs of four independent chains.
template <typename Term>
inline float sum_over(const float* p, int64_t n, Term term) {
  Vec total = {};
  int64_t i = 0;
  while (i + 4 * kLanes <= n) {
    const int64_t stop = i + kRun * 4 * kLanes < n ? i + kRun * 4 * kLanes : n;
    Vec block[4] = {};
    for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) block[j] += term(load(p + i + j * kLanes));
    }
    total += (block[0] + block[1]) + (block[2] + block[3]);
  }
  for (; i + kLanes <= n; i += kLanes) total += term(load(p + i));
  float rest = 0.0f;
  for (; i < n; ++i) rest += term(broadcast(p[i]))[0];
  return sum(total) + rest;
}

struct Statistics {
  Vec mean, rstd;
};

// Mean and 1 / sqrt(unbiased variance + eps), in two passes.
inline Statistics compute_statistics(const float* p, int64_t n) {
  const Vec mean = broadcast(sum_over(p, n, [](Vec v) { return v; }) / static_cast<float>(n));
  const float squares = sum_over(p, n, [=](Vec v) { return (v - mean) * (v - mean); });
  return {mean, broadcast(1.0f / __builtin_sqrtf(squares / static_cast<float>(n - 1) + kVarEps))};
}

// Where the lanes of three channels go when they are interleaved: lane i of vector j is channel (j
// * kLanes + i) % 3 of pixel (j * kLanes + i) / 3. `first` picks from (red, green), `second` from
// that and blue.
struct InterleaveIndices {
  int32_t first[3][kLanes], second[3][kLanes];
  constexpr InterleaveIndices() : first(), second() {
    for (int j = 0; j < 3; ++j) {
      for (int i = 0; i < kLanes; ++i) {
        const int channel = (j * kLanes + i) % 3, pixel = (j * kLanes + i) / 3;
        first[j][i] = channel == 1 ? kLanes + pixel : pixel;
        second[j][i] = channel == 2 ? kLanes + pixel : i;
      }
    }
  }
};
[[maybe_unused]] constexpr InterleaveIndices kInterleave;

// planar [C, pixels] from pixel `q` on to channel-fastest.
inline void interleave(const float* planar, int64_t channels, int64_t pixels, int64_t q, float* out) {
  for (; q < pixels; ++q) {
    for (int64_t c = 0; c < channels; ++c) *out++ = planar[c * pixels + q];
  }
}

// The error of one predicted patch, pred - target, in the order of pred: visit(offset, chain,
// error) for whole vectors, where chain in 0 .. 2 names independent sums, last(offset, count,
// error) for the rest. Pixels and prediction of the next removed patch are prefetched into L2: L1
// has few misses outstanding, and more would stall the arithmetic.
template <typename Pred, typename Pixel>
class PatchError {
 public:
  explicit PatchError(const MaskedMse& args)
      : args_(args),
        L_(args.imgs.patches()),
        P_(args.imgs.patch_values()),
        planar_(P_),
        interleaved_(args.imgs.channels == 1 ? 0 : P_) {}

  template <typename Visit, typename Last>
  void operator()(int64_t unit, int64_t end, Visit visit, Last last) {
    const Image& imgs = args_.imgs;
    const int64_t C = imgs.channels, pixels = P_ / C;
    int64_t next = unit + 1;
    while (next < end && args_.row[next] < 0) ++next;
    if (next == end) next = unit;
    const Pixel* pixels_ahead = static_cast<const Pixel*>(imgs.data) + imgs.row(next / L_, next % L_, 0, 0);
    copy_patch<Pixel>(imgs, unit / L_, unit % L_, static_cast<float*>(planar_), [&](int64_t c, int64_t y) {
      __builtin_prefetch(pixels_ahead + c * imgs.stride_c + y * imgs.stride_h, 0, kToL2);
    });
    const Pred *pred = pred_row(unit), *pred_ahead = pred_row(next);
    Statistics stats = {broadcast(0.0f), broadcast(1.0f)};
    if (args_.norm_pix) stats = compute_statistics(planar_, P_);
    const float* target = planar_;
    int64_t i = 0;
#if defined(__GNUC__) && !defined(__clang__)
    if (C == 3 && kLanes > 1) {
      VecI first[3], second[3];
      std::memcpy(first, kInterleave.first, sizeof first);
      std::memcpy(second, kInterleave.second, sizeof second);
      int64_t q = 0;
      for (; q + kLanes <= pixels; q += kLanes) {
        Vec rgb[3];
        for (int c = 0; c < 3; ++c) rgb[c] = (load(planar_ + c * pixels + q) - stats.mean) * stats.rstd;
        for (int j = 0; j < 3; ++j, i += kLanes) {
          __builtin_prefetch(pred_ahead + i, 0, kToL2);
          const Vec wanted = __builtin_shuffle(__builtin_shuffle(rgb[0], rgb[1], first[j]), rgb[2], second[j]);
          visit(i, j, load(pred + i) - wanted);
        }
      }
      if (q < pixels) interleave(planar_, C, pixels, q, interleaved_ + i);
      target = interleaved_;
    } else
#endif
        if (C > 1) {
      interleave(planar_, C, pixels, 0, interleaved_);
      target = interleaved_;
    }
    for (; i + kLanes <= P_; i += kLanes) {
      __builtin_prefetch(pred_ahead + i, 0, kToL2);
      visit(i, 0, load(pred + i) - (load(target + i) - stats.mean) * stats.rstd);
    }
    if (i < P_) last(i, P_ - i, load_first(pred + i, P_ - i) - (load_first(target + i, P_ - i) - stats.mean) * stats.rstd);
  }

 private:
  static constexpr int kToL2 = 2;

  const Pred* pred_row(int64_t unit) const {
    return static_cast<const Pred*>(args_.pred) + unit / L_ * args_.pred_stride_n + args_.row[unit] * args_.pred_stride_l;
  }

  const MaskedMse& args_;
  const int64_t L_, P_;
  const Scratch<float> planar_, interleaved_;
};

template <typename Pred, typename Pixel>
void forward(const MaskedMse& args, int64_t begin, int64_t end) {
  const float P = static_cast<float>(args.imgs.patch_values());
  PatchError<Pred, Pixel> patch_error(args);
  for (int64_t unit = begin; unit < end; ++unit) {
    args.patch_loss[unit] = 0.0f;
    if (args.row[unit] < 0) continue;
    Vec total = {}, block[3] = {};
    float rest = 0.0f;
    patch_error(
        unit, end,
        [&](int64_t i, int chain, Vec error) {
          if (chain == 0 && i % (kRun * 3 * kLanes) == 0) {
            total += block[0] + block[1] + block[2];
            for (Vec& sum : block) sum = Vec{};
          }
          block[chain] += error * error;
        },
        [&](int64_t, int64_t count, Vec error) {
          for (int64_t i = 0; i < count; ++i) rest += error[i] * error[i];
        });
    args.patch_loss[unit] = (sum(total + (block[0] + block[1] + block[2])) + rest) / P;
  }
}

template <typename Pred, typename Pixel>
void backward(const MaskedMse& args, int64_t begin, int64_t end) {
  const int64_t L = args.imgs.patches(), P = args.imgs.patch_values();
  const bool all_rows = args.rows == L;
  PatchError<Pred, Pixel> patch_error(args);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = args.row[unit];
    if (row < 0 && !all_rows) continue;
    Pred* dpred = static_cast<Pred*>(args.dpred) + (unit / L * args.rows + (row < 0 ? unit % L : row)) * P;
    if (row < 0) {
      std::memset(dpred, 0, P * sizeof(Pred));
      continue;
    }
    const Vec scale = broadcast(args.scale * args.mask[unit]);
    const auto last = [&](int64_t i, int64_t count, Vec error) { store_first(dpred + i, error * scale, count); };
    if constexpr (sizeof(Pred) == sizeof(float)) {
      if (args.streaming) {
        patch_error(unit, end, [&](int64_t i, int, Vec error) { stream(dpred + i, error * scale); }, last);
        continue;
      }
    }
    patch_error(unit, end, [&](int64_t i, int, Vec error) { store(dpred + i, error * scale); }, last);
  }
  if (args.streaming) stream_fence();
}

}  // namespace

// Units, both: patches of the image.
void masked_mse_fwd_kernel(const MaskedMse& args, int64_t begin, int64_t end) {
  visit_float(args.pred_dtype, [&](auto pred) {
    visit_pixel(args.imgs.dtype, [&](auto pixel) { forward<decltype(pred), decltype(pixel)>(args, begin, end); });
  });
}

void masked_mse_bwd_kernel(const MaskedMse& args, int64_t begin, int64_t end) {
  visit_float(args.pred_dtype, [&](auto pred) {
    visit_pixel(args.imgs.dtype, [&](auto pixel) { backward<decltype(pred), decltype(pixel)>(args, begin, end); });
  });
}

}  // namespace MAEFAST_ISA

#ifdef MAEFAST_ENTRY
MAEFAST_DECLARE_KERNEL(masked_mse_fwd_kernel, MaskedMse)
MAEFAST_DECLARE_KERNEL(masked_mse_bwd_kernel, MaskedMse)
#endif

}  // namespace maefast::cpu

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cpu {
namespace {

// What forward and backward share: the checked inputs, the sum of the weights, and which row of
// pred each patch has.
struct MaskedMseInput {
  ImageInput imgs;
  Tensor pred, mask;
  std::vector<int32_t> row;
  double weight = 0.0;
  MaskedMse args;

  MaskedMseInput(const Tensor& pred_in, const Tensor& imgs_in, const Tensor& mask_in, int64_t patch_h, int64_t patch_w,
                 bool norm_pix, const std::optional<Tensor>& mean, const std::optional<Tensor>& std)
      : imgs(imgs_in, patch_h, patch_w, mean, std),
        pred(pred_in.dim() == 3 ? dense_rows(pred_in) : pred_in),
        mask(torch::stable::contiguous(mask_in)) {
    const int64_t N = imgs_in.size(0), L = imgs.image.patches();
    check(mask.dim() == 2 && mask.size(0) == N && mask.size(1) == L && mask.scalar_type() == ScalarType::Float,
          "mask must be (N, L) float32 with the N and the patches of imgs");
    check(pred.dim() == 3 && pred.size(0) == N && pred.size(1) <= L && pred.size(2) == imgs.image.patch_values(),
          "pred must be (N, L, P) or (N, M, P) with the N and the patch values of imgs");
    check(pred.size(2) >= 1, "patches must have a value");
    const int64_t rows = pred.size(1);
    const float* weights = static_cast<const float*>(mask.const_data_ptr());
    row.resize(N * L);
    for (int64_t n = 0; n < N; ++n) {
      int64_t removed = 0;
      for (int64_t i = 0; i < L; ++i) {
        const float w = weights[n * L + i];
        weight += w;
        row[n * L + i] = w == 0.0f ? -1 : static_cast<int32_t>(rows == L ? i : removed);
        removed += w != 0.0f;
      }
      check(rows == L || removed == rows, "pred has ", rows, " rows a sample, but row ", n, " of mask removes ", removed,
            " patches");
    }
    check(N == 0 || weight != 0.0, "mask is all zeros: the mean over removed patches does not exist");
    args = {
        .imgs = imgs.image,
        .pred = pred.const_data_ptr(),
        .pred_dtype = float_dtype("pred", pred.scalar_type()),
        .pred_stride_n = pred.stride(0),
        .pred_stride_l = pred.stride(1),
        .mask = weights,
        .row = row.data(),
        .norm_pix = norm_pix,
        .rows = rows,
    };
  }
};

Tensor masked_mse_fwd(const Tensor& pred, const Tensor& imgs, const Tensor& mask, int64_t patch_h, int64_t patch_w, bool norm_pix,
                      const std::optional<Tensor>& mean, const std::optional<Tensor>& std) {
  MaskedMseInput input(pred, imgs, mask, patch_h, patch_w, norm_pix, mean, std);
  const int64_t units = static_cast<int64_t>(input.row.size());
  std::vector<float> patch_loss(units);
  input.args.patch_loss = patch_loss.data();
  run(MAEFAST_KERNEL(masked_mse_fwd_kernel), input.args, units, 8 * input.args.imgs.patch_values());
  double total = 0.0;
  for (int64_t i = 0; i < units; ++i) total += static_cast<double>(input.args.mask[i]) * patch_loss[i];
  Tensor loss = empty_cpu({}, ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total / input.weight);
  return loss;
}

Tensor masked_mse_bwd(const Tensor& dloss, const Tensor& pred, const Tensor& imgs, const Tensor& mask, int64_t patch_h,
                      int64_t patch_w, bool norm_pix, const std::optional<Tensor>& mean, const std::optional<Tensor>& std) {
  check(dloss.numel() == 1 && dloss.scalar_type() == ScalarType::Float, "dloss must be a float32 scalar");
  MaskedMseInput input(pred, imgs, mask, patch_h, patch_w, norm_pix, mean, std);
  const int64_t P = input.args.imgs.patch_values();
  Tensor dpred = empty_cpu({pred.size(0), pred.size(1), P}, pred.scalar_type());
  input.args.dpred = dpred.mutable_data_ptr();
  input.args.streaming = may_stream(dpred, P);
  input.args.scale = static_cast<float>(*static_cast<const float*>(dloss.const_data_ptr()) * 2.0 / (P * input.weight));
  run(MAEFAST_KERNEL(masked_mse_bwd_kernel), input.args, static_cast<int64_t>(input.row.size()), 12 * P);
  return dpred;
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) {
  m.impl("masked_mse_fwd", TORCH_BOX(&masked_mse_fwd));
  m.impl("masked_mse_bwd", TORCH_BOX(&masked_mse_bwd));
}

}  // namespace
}  // namespace maefast::cpu
#endif
