// The only file that includes torch headers: the stable ABI of torch >= 2.10, and what every boxed
// entry needs from it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace maefast {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws with a message made of `parts` unless `ok`; it reaches Python as the exception's whole
// text.
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }
}

inline int64_t item_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
      return 4;
    case ScalarType::Long:
      return 8;
    default:
      throw std::invalid_argument("no maefast kernel takes this dtype");
  }
}

// Calls an op of torch by name; its result is the first item of `stack`.
template <typename... Args>
Tensor call_op(const char* name, const Args&... args) {
  StableIValue stack[]{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Returns an uninitialised contiguous tensor on the CPU. Large ones ask for huge pages: the kernel
// that fills fresh memory takes its page faults, and those of 4 KiB pages cost several times as
// much as writing.
inline Tensor empty_cpu(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  Tensor out = torch::stable::empty(sizes, dtype);
  constexpr int64_t kLarge = 4 << 20;  // two huge pages
  constexpr int64_t kPage = 4096;
  const int64_t bytes = out.numel() * item_size(dtype);
  if (bytes >= kLarge) {
    const auto begin = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kPage - 1) / kPage * kPage;
    const auto end = (reinterpret_cast<uintptr_t>(out.data_ptr()) + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may be refused
  }
  return out;
}

// Returns `t` if its last dimension is dense, else a contiguous copy.
inline Tensor dense_rows(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// Whether rows of `width` fp32 values are written past the caches: they are whole aligned vectors,
// and the output is as large as L3.
inline bool may_stream(const Tensor& out, int64_t width) {
  constexpr int64_t kLarge = 16 << 20;  // L3
  constexpr int64_t kVector = 64;
  return out.scalar_type() == ScalarType::Float && out.numel() * 4 >= kLarge && width * 4 % kVector == 0 &&
         reinterpret_cast<uintptr_t>(out.data_ptr()) % kVector == 0;
}

// Runs `kernel` on units [0, units) with torch's threads; a unit touches about `bytes` bytes.
template <typename Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t units, int64_t bytes) {
  constexpr int64_t kBytesPerTask = 64 << 10;  // below it a second thread costs more than it brings
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes));
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace maefast
