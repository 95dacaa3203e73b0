// The Simd operations of attend_simd.h in AVX2, with or without VNNI. Included by unit_avx2.cc and unit_avxvnni.cc
// alone.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "cpu/simd_x86.h"

namespace {

struct Simd : SimdBytes16 {
  using F = __m256;   // floats
  using I = __m256i;  // int32 sums, or bytes
  static constexpr int kLanes = 8;
  static constexpr int kAccumulators = 8;  // registers that a kernel may hold sums in
#if defined(__AVXVNNI__)
  static constexpr bool kByteDot = true;  // dot takes codes of 8 bits
#else
  static constexpr bool kByteDot = false;  // pairs of 8-bit products overflow int16; of 4-bit ones they do not
#endif

  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* to, F x) { _mm256_storeu_ps(to, x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static float sum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float largest(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale(F a, F exponent) {  // a * 2^exponent, for exponents of normal numbers
    const I bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(bits));
  }
  static F load_half(const void* x) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(x))); }

  static I zero() { return _mm256_setzero_si256(); }
  static I load_bytes(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
  static I repeat4(const int8_t* x) {  // four bytes in every lane
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static F as_float(I a) { return _mm256_castsi256_ps(a); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  // acc + sums of four products of unsigned codes and signed weights.
  static I dot(I acc, I codes, I weights) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, codes, weights);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, weights), _mm256_set1_epi16(1)));
#endif
  }
  // Bits [shift, shift + width) of every byte.
  template <int kShift, int kWidth>
  static I field(I x) {
    if constexpr (kWidth == 8) return x;
    return _mm256_and_si256(_mm256_srli_epi16(x, kShift), _mm256_set1_epi8(static_cast<char>((1 << kWidth) - 1)));
  }
  // Lane i of the 8 numbers at x: x[index[i]], for indices below kLanes.
  static I permute(const void* x, const int32_t* index) {
    return _mm256_permutevar8x32_epi32(load_bytes(x), load_bytes(index));
  }

  // rint(x * factor), within +-32512, as 256 * high + low; adds them to *total.
  static void split16(const float* x, float factor, Bytes16* high, Bytes16* low, I* total) {
    I h[2], l[2];
    for (int i = 0; i < 2; i++) {
      const I a = _mm256_cvtps_epi32(_mm256_mul_ps(load(x + 8 * i), set(factor)));
      *total = add(*total, a);
      h[i] = _mm256_srai_epi32(_mm256_add_epi32(a, _mm256_set1_epi32(128)), 8);
      l[i] = _mm256_sub_epi32(a, _mm256_slli_epi32(h[i], 8));
    }
    *high = narrow(h[0], h[1]);
    *low = narrow(l[0], l[1]);
  }
  static Bytes16 narrow(I a, I b) {
    const I words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
};

}  // namespace
