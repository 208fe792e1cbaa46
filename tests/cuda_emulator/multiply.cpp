// What the entries of csrc/cuda/gemm ask of the GPU, and the functions of the epilogues.
#include "../../csrc/cuda/gemm/gelu.h"
#include "../../csrc/cuda/launch.h"

namespace {

int capability_major = 9;

}  // namespace

extern "C" void emulator_capability(int major) { capability_major = major; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int kProcessors = 132;
  *value = attribute == cudaDevAttrMultiProcessorCount ? kProcessors
                                                       : (attribute == cudaDevAttrComputeCapabilityMajor ? capability_major : 0);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

// The functions of the epilogues on fp32 values.
extern "C" void epilogue_functions(const float* v, float* gelu, float* slope, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    gelu[i] = maefast::cuda::gemm::gelu(v[i]);
    slope[i] = maefast::cuda::gemm::gelu_slope(v[i]);
  }
}
