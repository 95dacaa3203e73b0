// What the vocabularies of simd_avx2.h and simd_avx512.h have in common: orders of 16 bytes.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

struct SimdBytes16 {
  using Bytes16 = __m128i;  // 16 bytes

  static void store16(int8_t* to, Bytes16 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), x); }

  // Bytes of 16 channels in the order of a plane of kWidth bits: fields outermost within each 32-bit word.
  template <int kWidth>
  static Bytes16 arrange(Bytes16 x) {
    if constexpr (kWidth == 4) {
      return _mm_shuffle_epi8(x, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    } else if constexpr (kWidth == 2) {
      return _mm_shuffle_epi8(x, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    }
    return x;
  }
  // The same for a plane of one bit, whose words hold 32 channels.
  static void arrange32(Bytes16* first, Bytes16* second) {
    const Bytes16 pairs = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    const Bytes16 a = _mm_shuffle_epi8(*first, pairs), b = _mm_shuffle_epi8(*second, pairs);
    *first = _mm_unpacklo_epi16(a, b);
    *second = _mm_unpackhi_epi16(a, b);
  }
};

}  // namespace
