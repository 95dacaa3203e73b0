// The Simd operations of attend_simd.h in AVX-512 VNNI. Included by unit_avx512.cc alone.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "cpu/simd_x86.h"

namespace {

struct Simd : SimdBytes16 {
  using F = __m512;   // floats
  using I = __m512i;  // int32 sums, or bytes
  static constexpr int kLanes = 16;
  static constexpr int kAccumulators = 16;  // registers that a kernel may hold sums in
  static constexpr bool kByteDot = true;    // dot takes codes of 8 bits

  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* to, F x) { _mm512_storeu_ps(to, x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale(F a, F exponent) { return _mm512_scalef_ps(a, exponent); }  // a * 2^exponent
  static F load_half(const void* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(x))); }

  static I zero() { return _mm512_setzero_si512(); }
  static I load_bytes(const void* x) { return _mm512_loadu_si512(x); }
  static I repeat4(const int8_t* x) {  // four bytes in every lane
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
  }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static float sum(I a) { return static_cast<float>(_mm512_reduce_add_epi32(a)); }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  // acc + sums of four products of unsigned codes and signed weights.
  static I dot(I acc, I codes, I weights) { return _mm512_dpbusd_epi32(acc, codes, weights); }
  // Bits [shift, shift + width) of every byte.
  template <int kShift, int kWidth>
  static I field(I x) {
    if constexpr (kWidth == 8) return x;
    return _mm512_and_si512(_mm512_srli_epi16(x, kShift), _mm512_set1_epi8(static_cast<char>((1 << kWidth) - 1)));
  }
  // Lane i of the 16 numbers at x: x[index[i]], for indices below kLanes.
  static I permute(const void* x, const int32_t* index) {
    return _mm512_permutexvar_epi32(_mm512_loadu_si512(index), _mm512_loadu_si512(x));
  }

  // rint(x * factor), within +-32512, as 256 * high + low; adds them to *total.
  static void split16(const float* x, float factor, Bytes16* high, Bytes16* low, I* total) {
    const I a = _mm512_cvtps_epi32(_mm512_mul_ps(load(x), set(factor)));
    *total = add(*total, a);
    *high = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(128)), 8));
    *low = _mm512_cvtepi32_epi8(a);  // the low byte of a is that of a - 256 * high
  }
};

}  // namespace
