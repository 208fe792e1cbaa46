// What the boxed entries of the CUDA ops share: device and stream of a launch, and its errors.
#pragma once

#include <cuda_runtime_api.h>

#include "../stable.h"

namespace maefast::cuda {
namespace {

// Makes the device of a tensor current for as long as it lives; `stream` is torch's current one there.
class Launch {
 public:
  cudaStream_t stream;

  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("maefast ") + op + ": " + cudaGetErrorString(error));
}

// `t` itself where it is contiguous and starts at a multiple of 16 bytes, else a copy that does.
inline Tensor packed(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

}  // namespace
}  // namespace maefast::cuda
