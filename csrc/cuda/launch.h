// What the kernels of the MAE ops share, free of torch: dtypes, packs of values, sums over a warp,
// division by a constant, and the launch of a kernel that takes one struct of arguments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dtype.h"

namespace maefast::cuda {

using BFloat16 = __nv_bfloat16;
using Half = __half;
using U8 = uint8_t;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ inline float to_float(T value) {
  if constexpr (std::is_same_v<T, BFloat16>) return __bfloat162float(value);
  if constexpr (std::is_same_v<T, Half>) return __half2float(value);
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, U8>) return static_cast<float>(value);
}

template <typename T>
__device__ inline T from_float(float value) {
  if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<T, Half>) return __float2half_rn(value);
  if constexpr (std::is_same_v<T, float>) return value;
}

// `n` neighbours in memory, read and written by accesses of up to 16 bytes.
template <typename T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  T value[n];
};

template <int n, typename T>
__device__ inline Pack<T, n> load(const T* at) {
  return *reinterpret_cast<const Pack<T, n>*>(at);
}

template <int n, typename T>
__device__ inline void store(T* at, const Pack<T, n>& pack) {
  *reinterpret_cast<Pack<T, n>*>(at) = pack;
}

// The sum over the lanes of a warp, the same bits in each.
template <typename T>
__device__ inline T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

extern __shared__ __align__(16) unsigned char shared_memory[];

// The shared memory that the launch asked for, from byte `offset` on.
template <typename T>
__device__ inline T* shared(size_t offset = 0) {
  return reinterpret_cast<T*>(shared_memory + offset);
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args args) {
  void* pointers[] = {&args};
  return cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes, stream);
}

// Calls `body` with a value of the type.
template <typename Body>
auto visit_float(DType dtype, Body&& body) {
  if (dtype == DType::bf16) return body(BFloat16{});
  if (dtype == DType::f16) return body(Half{});
  return body(float{});
}

template <typename Body>
auto visit_pixel(DType dtype, Body&& body) {
  return dtype == DType::u8 ? body(U8{}) : visit_float(dtype, body);
}

// n / divisor for 0 <= n < 2^31 without a division (Granlund and Montgomery 1994).
class Divisor {
 public:
  int value;

  Divisor() = default;
  explicit Divisor(int divisor) : value(divisor), shift_(0) {
    const uint64_t d = divisor > 0 ? divisor : 1;  // a divisor of 0 is never used
    while ((uint64_t{1} << shift_) < d) ++shift_;
    factor_ = static_cast<unsigned>(((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - d)) / d + 1);
  }
  __device__ int quotient(int n) const {
    const unsigned dividend = n;
    return static_cast<int>((__umulhi(dividend, factor_) + dividend) >> shift_);
  }

 private:
  int shift_;
  unsigned factor_;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every access of `bytes` at multiples of the strides from `data` is aligned.
template <typename... Strides>
bool is_aligned(const void* data, int64_t bytes, Strides... strides) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && ((strides % bytes == 0) && ...);
}

}  // namespace maefast::cuda
