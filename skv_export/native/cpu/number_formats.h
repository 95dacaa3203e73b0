// Number formats of rows: float16 and bfloat16 to float32 and back, with the same bits on every instruction set.
//
// Included by tile_codec.h into each unit and compiled with its instruction set: everything is in an unnamed namespace.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kv_layout.h"

namespace {

constexpr float kHalfMax = 65504.0f;

float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

#if defined(__F16C__)
float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
#else
float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {  // a subnormal: by arithmetic, as a shift would give a float that the processor may flush
    const float magnitude = static_cast<float>(mantissa) * (1.0f / 16777216.0f);
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
#endif

// To nearest even; saturates; not-a-number stays one.
uint16_t float_to_half(float x) {
  if (x != x) return 0x7e00u;
  x = x > kHalfMax ? kHalfMax : x < -kHalfMax ? -kHalfMax : x;
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

uint16_t float_to_bfloat(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

uint16_t load16(const void* source, int64_t index) {
  uint16_t bits;
  memcpy(&bits, static_cast<const uint8_t*>(source) + 2 * index, 2);
  return bits;
}

void store16(void* target, int64_t index, uint16_t bits) {
  memcpy(static_cast<uint8_t*>(target) + 2 * index, &bits, 2);
}

void load_row(int32_t type, const void* source, float* row, int32_t n) {
  if (type == SKV_FLOAT) {
    memcpy(row, source, sizeof(float) * n);
    return;
  }
  int i = 0;
  if (type == SKV_BFLOAT16) {
    for (; i < n; i++) row[i] = bits_to_float(uint32_t{load16(source, i)} << 16);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const auto* halfs = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(source) + 2 * i);
    _mm256_storeu_ps(row + i, _mm256_cvtph_ps(_mm_loadu_si128(halfs)));
  }
#endif
  for (; i < n; i++) row[i] = half_to_float(load16(source, i));
}

void store_row(int32_t type, const float* row, void* target, int32_t n) {
  if (type == SKV_FLOAT) {
    memcpy(target, row, sizeof(float) * n);
  } else if (type == SKV_BFLOAT16) {
    for (int i = 0; i < n; i++) store16(target, i, float_to_bfloat(row[i]));
  } else {
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      // In this order of operands, not-a-number stays one.
      const __m256 low = _mm256_max_ps(_mm256_set1_ps(-kHalfMax), _mm256_loadu_ps(row + i));
      const __m256 x = _mm256_min_ps(_mm256_set1_ps(kHalfMax), low);
      auto* halfs = reinterpret_cast<__m128i*>(static_cast<uint8_t*>(target) + 2 * i);
      _mm_storeu_si128(halfs, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; i < n; i++) store16(target, i, float_to_half(row[i]));
  }
}

}  // namespace
