// random_masking: ranks of the noise, ties broken by index. Counting for short rows, a stable radix
// sort for long ones.
#include "isa.h"
#include "vec.h"

namespace maefast::cpu {

struct RandomMasking {
  const float* noise;               // [N, L]
  int64_t *ids_keep, *ids_restore;  // [N, K], [N, L]
  float* mask;                      // [N, L]
  int64_t L, K;
};

namespace MAEFAST_ISA {
namespace {

// L^2 / kLanes comparisons against 4 passes over L and 256 buckets.
constexpr int64_t kCountingLimit = 16 * kLanes;

// An int32 that orders like the float: -0 equals +0, every NaN is the largest.
inline int32_t order_key(float value) {
  if (value != value) return INT32_MAX;
  value += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

// rank[i] = number of j with (key_j, j) < (key_i, i). keys is padded by kLanes readable values.
inline void rank_by_counting(const int32_t* keys, int64_t L, int32_t* rank) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t i = 0; i < L; i += kLanes) {
    VecI key, count = {};
    std::memcpy(&key, keys + i, sizeof key);
    const int64_t end = i + kLanes < L ? i + kLanes : L;
    for (int64_t j = 0; j < i; ++j) count -= keys[j] <= key;  // a true comparison is -1
    for (int64_t j = i; j < end; ++j) {
      const VecI other = keys[j] - VecI{};
      count -= (other < key) | ((other == key) & (static_cast<int32_t>(j - i) < lane));
    }
    for (int64_t j = end; j < L; ++j) count -= keys[j] < key;
    std::memcpy(rank + i, &count, (end - i) * sizeof(int32_t));
  }
}

// Four stable passes of eight bits; order and spare are [L].
inline void rank_by_sorting(const int32_t* keys, int64_t L, int32_t* rank, int32_t* order, int32_t* spare) {
  for (int64_t i = 0; i < L; ++i) order[i] = static_cast<int32_t>(i);
  for (int pass = 0; pass < 4; ++pass) {
    const auto bucket = [&](int32_t i) { return ((static_cast<uint32_t>(keys[i]) ^ 0x80000000u) >> (8 * pass)) & 255u; };
    int32_t start[257] = {};
    for (int64_t i = 0; i < L; ++i) ++start[bucket(order[i]) + 1];
    for (int b = 0; b < 256; ++b) start[b + 1] += start[b];
    for (int64_t i = 0; i < L; ++i) spare[start[bucket(order[i])]++] = order[i];
    int32_t* sorted = spare;
    spare = order;
    order = sorted;
  }
  for (int64_t r = 0; r < L; ++r) rank[order[r]] = static_cast<int32_t>(r);
}

}  // namespace

// Units: rows.
void random_masking_kernel(const RandomMasking& args, int64_t begin, int64_t end) {
  const int64_t L = args.L, K = args.K;
  const bool counting = L <= kCountingLimit;
  const Scratch<int32_t> keys(L + kLanes), rank(L), order(counting ? 0 : L), spare(counting ? 0 : L);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t i = 0; i < L; ++i) keys[i] = order_key(args.noise[n * L + i]);
    if (counting) {
      std::memset(keys + L, 0, kLanes * sizeof(int32_t));
      rank_by_counting(keys, L, rank);
    } else {
      rank_by_sorting(keys, L, rank, order, spare);
    }
    for (int64_t i = 0; i < L; ++i) {
      const int32_t r = rank[i];
      args.ids_restore[n * L + i] = r;
      args.mask[n * L + i] = r < K ? 0.0f : 1.0f;
      if (r < K) args.ids_keep[n * K + r] = i;
    }
  }
}

}  // namespace MAEFAST_ISA

#ifdef MAEFAST_ENTRY
MAEFAST_DECLARE_KERNEL(random_masking_kernel, RandomMasking)
#endif

}  // namespace maefast::cpu

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> random_masking_fwd(const Tensor& noise_in, int64_t len_keep) {
  check(noise_in.dim() == 2 && noise_in.scalar_type() == ScalarType::Float, "noise must be (N, L) float32");
  const Tensor noise = torch::stable::contiguous(noise_in);
  const int64_t N = noise.size(0), L = noise.size(1);
  check(len_keep >= 0 && len_keep <= L && L < INT32_MAX, "len_keep must be in [0, L], it is ", len_keep, " with L = ", L);
  Tensor ids_keep = empty_cpu({N, len_keep}, ScalarType::Long);
  Tensor ids_restore = empty_cpu({N, L}, ScalarType::Long);
  Tensor mask = empty_cpu({N, L}, ScalarType::Float);
  const RandomMasking args{
      .noise = static_cast<const float*>(noise.const_data_ptr()),
      .ids_keep = static_cast<int64_t*>(ids_keep.mutable_data_ptr()),
      .ids_restore = static_cast<int64_t*>(ids_restore.mutable_data_ptr()),
      .mask = static_cast<float*>(mask.mutable_data_ptr()),
      .L = L,
      .K = len_keep,
  };
  run(MAEFAST_KERNEL(random_masking_kernel), args, N, 32 * L);
  return {ids_keep, ids_restore, mask};
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) { m.impl("random_masking_fwd", TORCH_BOX(&random_masking_fwd)); }

}  // namespace
}  // namespace maefast::cpu
#endif
