// The instructions of csrc/cuda/mma.cuh on the CPU, by their definitions in the PTX ISA. A copy by
// cp.async arrives only when its group is waited for, so that tests notice a missing wait.
#pragma once

#include <cmath>
#include <cstdlib>
#include <utility>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace maefast::cuda {

extern unsigned char shared_memory[];

inline void mma_by_definition(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4],
                              float2 (*unpack)(uint32_t)) {
  const unsigned mine[] = {a[0], a[1], a[2], a[3], b0, b1};
  emulator::collective(mine, 6, [&] {
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    double sums[4] = {c[0], c[1], c[2], c[3]};
    for (int k = 0; k < 16; k += 2) {
      const int from = k % 8 / 2, upper = k / 8;
      for (int row = 0; row < 2; ++row) {
        const float2 x = unpack(emulator::shown(4 * g + from)[row + 2 * upper]);
        for (int column = 0; column < 2; ++column) {
          const float2 y = unpack(emulator::shown(4 * (2 * t + column) + from)[4 + upper]);
          sums[2 * row + column] += static_cast<double>(x.x) * y.x + static_cast<double>(x.y) * y.y;
        }
      }
    }
    for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(sums[i]);
  });
}

struct Bf16 {
  static uint32_t pack(float lo, float hi) { return __float2bfloat16_rn(lo).bits | uint32_t{__float2bfloat16_rn(hi).bits} << 16; }
  static float2 unpack(uint32_t two) {
    return {__bfloat162float({static_cast<uint16_t>(two)}), __bfloat162float({static_cast<uint16_t>(two >> 16)})};
  }
  static void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    mma_by_definition(d, a, b0, b1, c, unpack);
  }
};

struct F16 {
  static uint32_t pack(float lo, float hi) {
    const _Float16 both[] = {static_cast<_Float16>(lo), static_cast<_Float16>(hi)};
    uint32_t two;
    std::memcpy(&two, both, sizeof(two));
    return two;
  }
  static float2 unpack(uint32_t two) {
    _Float16 both[2];
    std::memcpy(both, &two, sizeof(two));
    return {static_cast<float>(both[0]), static_cast<float>(both[1])};
  }
  static void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    mma_by_definition(d, a, b0, b1, c, unpack);
  }
};

template <typename Element>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Element::mma_m16n8k16(c, a, b0, b1, c);
}

inline float ex2_approx(float x) { return std::exp2(x); }
inline float lg2_approx(float x) { return std::log2(x); }
inline float rcp_approx(float x) { return 1.0f / x; }

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared_memory);
}

template <typename T>
T& in_shared(uint32_t address) {
  if (address % alignof(T)) std::abort();
  return *reinterpret_cast<T*>(shared_memory + address);
}

inline void cp_async(uint32_t dst, const void* src, bool valid) {
  if (reinterpret_cast<uintptr_t>(src) % 16) std::abort();
  emulator::copies().push_back([=] { in_shared<uint4>(dst) = valid ? *static_cast<const uint4*>(src) : uint4{}; });
}
inline void cp_async_commit_group() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait_group() {
  emulator::wait_for_copies(kPending);
}

// Row `row` of matrix `i`, whose address lane 8 * i + row shows.
inline uint32_t shown_row(int i, int row) { return *emulator::shown(8 * i + row); }

template <int kCount>
void ldmatrix(uint32_t (&r)[kCount], uint32_t address, bool transposed) {
  emulator::collective(&address, 1, [&] {
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < kCount; ++i) {
      for (int row = 0; row < 8; ++row) {
        if (shown_row(i, row) % 16) std::abort();
      }
      if (transposed) {
        const uint32_t lo = in_shared<uint16_t>(shown_row(i, 2 * t) + 2 * g),
                       hi = in_shared<uint16_t>(shown_row(i, 2 * t + 1) + 2 * g);
        r[i] = lo | hi << 16;
      } else {
        r[i] = in_shared<uint32_t>(shown_row(i, g) + 4 * t);
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { ldmatrix(r, address, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) { ldmatrix(r, address, true); }
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) { ldmatrix(r, address, false); }

inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  emulator::collective(&address, 1, [&] {
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) in_shared<uint32_t>(shown_row(i, g) + 4 * t) = r[i];
  });
}

inline uint4 ld_shared_v4(uint32_t address) { return in_shared<uint4>(address); }
inline void ld_shared_v4(float (&v)[4], uint32_t address) { std::memcpy(v, &in_shared<uint4>(address), sizeof(v)); }
inline void st_shared(uint32_t address, float value) { in_shared<float>(address) = value; }
inline void st_shared_v2(uint32_t address, const float (&v)[2]) { std::memcpy(&in_shared<uint64_t>(address), v, sizeof(v)); }

inline unsigned thread_anew() { return threadIdx.x; }

inline void prefetch_l2(const void*) {}

}  // namespace maefast::cuda
