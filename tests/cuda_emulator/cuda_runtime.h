// The part of CUDA's runtime that the kernels of csrc/cuda use, on the CPU. Threads of a block are
// fibers that take turns at barriers; blocks run in sequence. It serves tests of results, not of
// speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __host__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
const char* cudaGetErrorString(cudaError_t error);
using cudaStream_t = void*;

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();

namespace emulator {

constexpr int kWarp = 32;

// Runs `thread` as every thread of every block. Each block starts with shared memory filled with
// one byte.
cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
// Shows `words` to the warp and waits for its other lanes. Then `read` sees the words of each lane.
void collective(const unsigned* words, int count, const std::function<void()>& read);
// The words that a lane of this warp shows, null if that lane has ended.
const unsigned* shown(int lane);
int lane();
// Copies of this thread that no group holds yet. A group is done once at most `pending` later
// groups are not.
std::vector<std::function<void()>>& copies();
void commit_copies();
void wait_for_copies(int pending);

}  // namespace emulator

void __syncthreads();
void __syncwarp();

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  static_assert(sizeof(T) == sizeof(unsigned));
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  emulator::collective(&bits, 1, [&] {
    const unsigned* other = emulator::shown(emulator::lane() ^ lane_mask);
    bits = other ? *other : 0x7fffffff;  // NaN
  });
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

inline int __any_sync(unsigned, int predicate) {
  const unsigned mine = predicate != 0;
  int any = 0;
  emulator::collective(&mine, 1, [&] {
    for (int lane = 0; lane < emulator::kWarp; ++lane) any |= emulator::shown(lane) && *emulator::shown(lane);
  });
  return any;
}

template <typename T>
void __stcg(T* at, T value) {
  *at = value;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
using std::min;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

template <typename Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t) {
  const Args& args = *static_cast<const Args*>(arguments[0]);
  return emulator::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [&] { kernel(args); });
}
