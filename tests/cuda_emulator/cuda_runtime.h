// As much of CUDA's runtime as the kernels of the MAE ops use, on the CPU: a block's threads are fibers of one thread of the
// machine that take turns at barriers, blocks run one after the other. For tests of what kernels compute, not of how fast.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
const char* cudaGetErrorString(cudaError_t error);
using cudaStream_t = void*;

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();

namespace emulator {

// Runs `thread` as every thread of every block, with fresh shared memory full of NaN for each block.
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
unsigned exchange(unsigned value, int lane_mask);

}  // namespace emulator

void __syncthreads();
void __syncwarp();

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  static_assert(sizeof(T) == sizeof(unsigned));
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = emulator::exchange(bits, lane_mask);
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
using std::min;

template <typename Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t) {
  const Args& args = *static_cast<const Args*>(arguments[0]);
  return emulator::run(grid, block, shared_bytes, [&] { kernel(args); });
}
