// The instruction set, chosen at run time. Kernels are compiled once for each, in namespaces
// scalar, avx2, avx512 and avx512bf16 (AVX-512 with dot products of bf16 pairs).
#pragma once

#include <cstdint>

namespace maefast::cpu {

enum class Isa { scalar, avx2, avx512, avx512bf16 };

// The best instruction set of this CPU, or the one forced by maefast_set_cpu_isa.
Isa isa();

}  // namespace maefast::cpu

// Declares kernel `name`, which works on the units [begin, end) of `Args`, in every compilation;
// MAEFAST_KERNEL is the one to run.
#ifdef __x86_64__
#define MAEFAST_DECLARE_KERNEL(name, Args)                 \
  namespace scalar {                                       \
  void name(const Args& args, int64_t begin, int64_t end); \
  }                                                        \
  namespace avx2 {                                         \
  void name(const Args& args, int64_t begin, int64_t end); \
  }                                                        \
  namespace avx512 {                                       \
  void name(const Args& args, int64_t begin, int64_t end); \
  }                                                        \
  namespace avx512bf16 {                                   \
  void name(const Args& args, int64_t begin, int64_t end); \
  }
#define MAEFAST_KERNEL(name)                    \
  (isa() == Isa::avx512bf16 ? &avx512bf16::name \
   : isa() == Isa::avx512   ? &avx512::name     \
   : isa() == Isa::avx2     ? &avx2::name       \
                            : &scalar::name)
#else
#define MAEFAST_DECLARE_KERNEL(name, Args)                 \
  namespace scalar {                                       \
  void name(const Args& args, int64_t begin, int64_t end); \
  }
#define MAEFAST_KERNEL(name) (&scalar::name)
#endif
