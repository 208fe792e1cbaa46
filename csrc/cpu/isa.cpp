#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>

namespace maefast::cpu {
namespace {

bool supported([[maybe_unused]] Isa isa) {
#ifdef __x86_64__
  if (isa == Isa::avx512bf16) return __builtin_cpu_supports("avx512bf16") && supported(Isa::avx512);
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && supported(Isa::avx2);
  }
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return isa == Isa::scalar;
}

constexpr Isa kWidestFirst[] = {Isa::avx512bf16, Isa::avx512, Isa::avx2, Isa::scalar};
constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};

Isa best() { return *std::find_if(std::begin(kWidestFirst), std::end(kWidestFirst), supported); }

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{best()};
  return value;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

}  // namespace maefast::cpu

// Called by maefast._C.
extern "C" __attribute__((visibility("default"))) const char* maefast_cpu_isa() {
  return maefast::cpu::kNames[static_cast<int>(maefast::cpu::isa())];
}

// Forces an instruction set by name; "auto" chooses the best. Returns false and changes nothing if
// the name is unknown or the CPU lacks the set.
extern "C" __attribute__((visibility("default"))) bool maefast_set_cpu_isa(const char* name) {
  using namespace maefast::cpu;
  if (std::strcmp(name, "auto") == 0) {
    current() = best();
    return true;
  }
  for (Isa candidate : kWidestFirst) {
    if (std::strcmp(name, kNames[static_cast<int>(candidate)]) == 0 && supported(candidate)) {
      current() = candidate;
      return true;
    }
  }
  return false;
}
