// A small vector of fp32, as wide as the instruction set of this compilation: 16, 8 or 1 lanes.
// bf16, fp16 and uint8 are widened on load, bf16 and fp16 rounded to nearest even on store.
// Everything has internal linkage: no code of one instruction set can be linked into another.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "../dtype.h"

#if defined(MAEFAST_ISA_avx512) || defined(MAEFAST_ISA_avx2)
#include <immintrin.h>
#endif

namespace maefast::cpu {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

namespace MAEFAST_ISA {
namespace {

#if defined(MAEFAST_ISA_avx512)
constexpr int kLanes = 16;
constexpr __mmask16 kAllLanes = 0xffff;  // GCC warns of an undefined operand in unmasked intrinsics
#elif defined(MAEFAST_ISA_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 1;
#endif

// For functions that take a vector by value: GCC 12 pushes one of a single lane onto the stack, and
// in a loop does not take it off again.
#define MAEFAST_INLINE [[gnu::always_inline]] inline

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * kLanes)));
typedef uint8_t VecU8 __attribute__((vector_size(kLanes)));

// Calls f with a value of the C++ type of `dtype`, for the sake of that type alone: one kernel for
// all floating-point dtypes.
template <typename F>
inline void visit_float(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

// Calls f for pixels, which may also be bytes.
template <typename F>
inline void visit_pixel(DType dtype, F f) {
  dtype == DType::u8 ? f(uint8_t{}) : visit_float(dtype, f);
}

inline Vec broadcast(float value) { return value - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const bf16* p) {
#if defined(MAEFAST_ISA_avx512)
  // GCC would widen the two halves apart.
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(reinterpret_cast<VecU>(wide) << 16);
#else
  VecU16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return reinterpret_cast<Vec>(__builtin_convertvector(bits, VecU) << 16);
#endif
}

inline Vec load(const f16* p) {
#if defined(MAEFAST_ISA_avx512)
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(MAEFAST_ISA_avx2)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  const uint32_t sign = (p->bits & 0x8000u) << 16, magnitude = p->bits & 0x7fffu;
  const uint32_t shifted = magnitude << 13;
  float value;
  std::memcpy(&value, &shifted, sizeof value);
  value *= 0x1p112f;  // the exponent's bias, subnormals included
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x7c00) bits = 0x7f800000u | shifted;
  bits |= sign;
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
#endif
}

inline Vec load(const uint8_t* p) {
  VecU8 bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, VecI), Vec);
}

MAEFAST_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

MAEFAST_INLINE void store(bf16* p, Vec v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU quiet = (bits >> 16) | 0x40;
  const VecU16 out = __builtin_convertvector(v == v ? rounded : quiet, VecU16);  // NaN stays NaN
  std::memcpy(p, &out, sizeof out);
}

MAEFAST_INLINE void store(f16* p, Vec v) {
#if defined(MAEFAST_ISA_avx512)
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(kAllLanes, reinterpret_cast<__m512>(v), kNearest));
#elif defined(MAEFAST_ISA_avx2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // NaN stays NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: 0.5 + x has steps of 2^-24
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value += 0.5f;
    std::memcpy(&half, &value, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
#endif
}

// Load and store the first n < kLanes elements; the others read as zero and are not written.
template <typename T>
inline Vec load_first(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <typename T>
MAEFAST_INLINE void store_first(T* p, Vec v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

// Stores past the caches, for outputs larger than L3; p must be aligned to the vector. A kernel
// that streams ends with stream_fence().
MAEFAST_INLINE void stream(float* p, Vec v) {
#if defined(MAEFAST_ISA_avx512)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(MAEFAST_ISA_avx2)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
  store(p, v);
#endif
}

inline void stream_fence() {
#if defined(MAEFAST_ISA_avx512) || defined(MAEFAST_ISA_avx2)
  _mm_sfence();
#endif
}

// Memory for one range of units, 64-byte aligned, uninitialised.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {
    if (data_ == nullptr && count > 0) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

template <int N>
MAEFAST_INLINE Vec polynomial(Vec v, const float (&coefficients)[N]) {  // the highest power first
  Vec p = broadcast(coefficients[0]);
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) p = p * v + coefficients[i];
  return p;
}

// Folds all lanes into one by halves: combine(a, b) takes vectors of every width.
template <int N, typename V, typename Combine>
MAEFAST_INLINE float fold_lanes(V v, Combine combine) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    typedef float Narrow __attribute__((vector_size(2 * N)));
    Narrow halves[2];
    std::memcpy(halves, &v, sizeof v);
    return fold_lanes<N / 2>(combine(halves[0], halves[1]), combine);
  }
}

MAEFAST_INLINE float sum(Vec v) {
  return fold_lanes<kLanes>(v, [](auto a, auto b) { return a + b; });
}

}  // namespace
}  // namespace MAEFAST_ISA
}  // namespace maefast::cpu
