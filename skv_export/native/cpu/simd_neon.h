// The Simd operations of attend_simd.h in NEON with the dot product extension (Armv8.2). Included by unit_neon.cc
// alone.
#pragma once
#include <arm_neon.h>
#include <stdint.h>

namespace {

struct Simd {
  using F = float32x4_t;      // floats
  using I = int32x4_t;        // int32 sums, or bytes
  using Bytes16 = int8x16_t;  // 16 bytes
  static constexpr int kLanes = 4;
  static constexpr int kAccumulators = 16;  // registers that a kernel may hold sums in
  static constexpr bool kByteDot = false;   // sdot takes signed bytes: codes of at most 7 bits

  static F set(float x) { return vdupq_n_f32(x); }
  static F load(const float* x) { return vld1q_f32(x); }
  static void store(float* to, F x) { vst1q_f32(to, x); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F abs(F a) { return vabsq_f32(a); }
  static float sum(F a) { return vaddvq_f32(a); }
  static float largest(F a) { return vmaxvq_f32(a); }
  static F round(F a) { return vrndnq_f32(a); }
  static F scale(F a, F exponent) {  // a * 2^exponent, for exponents of normal numbers
    const I bits = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(exponent), vdupq_n_s32(127)), 23);
    return vmulq_f32(a, vreinterpretq_f32_s32(bits));
  }
  static F load_half(const void* x) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(static_cast<const uint8_t*>(x))));
  }

  static I zero() { return vdupq_n_s32(0); }
  static I load_bytes(const void* x) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(x))); }
  static I repeat4(const int8_t* x) {  // four bytes in every lane
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return vdupq_n_s32(four);
  }
  static I add(I a, I b) { return vaddq_s32(a, b); }
  static F as_float(I a) { return vreinterpretq_f32_s32(a); }
  static F to_float(I a) { return vcvtq_f32_s32(a); }
  // acc + sums of four products of codes and signed weights.
  static I dot(I acc, I codes, I weights) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(weights));
  }
  // Bits [shift, shift + width) of every byte.
  template <int kShift, int kWidth>
  static I field(I x) {
    uint8x16_t bytes = vreinterpretq_u8_s32(x);
    if constexpr (kShift > 0) bytes = vshrq_n_u8(bytes, kShift);
    if constexpr (kShift + kWidth < 8) bytes = vandq_u8(bytes, vdupq_n_u8((1 << kWidth) - 1));
    return vreinterpretq_s32_u8(bytes);
  }
  // Lane i of the 4 numbers at x: x[index[i]], for indices below kLanes.
  static I permute(const void* x, const int32_t* index) {
    const uint32x4_t first = vshlq_n_u32(vreinterpretq_u32_s32(vld1q_s32(index)), 2);
    // Bytes 4 * index + 0, 1, 2, 3 of each lane.
    const uint32x4_t bytes = vaddq_u32(vmulq_n_u32(first, 0x01010101u), vdupq_n_u32(0x03020100u));
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(load_bytes(x)), vreinterpretq_u8_u32(bytes)));
  }

  // rint(x * factor), within +-32512, as 256 * high + low; adds them to *total.
  static void split16(const float* x, float factor, Bytes16* high, Bytes16* low, I* total) {
    int16x8_t h[2], l[2];
    for (int i = 0; i < 2; i++) {
      const I a = vcvtnq_s32_f32(vmulq_n_f32(load(x + 8 * i), factor));
      const I b = vcvtnq_s32_f32(vmulq_n_f32(load(x + 8 * i + 4), factor));
      *total = add(*total, add(a, b));
      const I ha = vrshrq_n_s32(a, 8), hb = vrshrq_n_s32(b, 8);  // (a + 128) >> 8
      h[i] = vcombine_s16(vmovn_s32(ha), vmovn_s32(hb));
      l[i] = vcombine_s16(vmovn_s32(vsubq_s32(a, vshlq_n_s32(ha, 8))), vmovn_s32(vsubq_s32(b, vshlq_n_s32(hb, 8))));
    }
    *high = vcombine_s8(vmovn_s16(h[0]), vmovn_s16(h[1]));
    *low = vcombine_s8(vmovn_s16(l[0]), vmovn_s16(l[1]));
  }
  static void store16(int8_t* to, Bytes16 x) { vst1q_s8(to, x); }

  // Bytes of 16 channels in the order of a plane of kWidth bits: fields outermost within each 32-bit word.
  template <int kWidth>
  static Bytes16 arrange(Bytes16 x) {
    static const uint8_t kFour[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
    static const uint8_t kTwo[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    if constexpr (kWidth == 4) return vqtbl1q_s8(x, vld1q_u8(kFour));
    if constexpr (kWidth == 2) return vqtbl1q_s8(x, vld1q_u8(kTwo));
    return x;
  }
  // The same for a plane of one bit, whose words hold 32 channels.
  static void arrange32(Bytes16* first, Bytes16* second) {
    static const uint8_t kPairs[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
    const int16x8_t a = vreinterpretq_s16_s8(vqtbl1q_s8(*first, vld1q_u8(kPairs)));
    const int16x8_t b = vreinterpretq_s16_s8(vqtbl1q_s8(*second, vld1q_u8(kPairs)));
    *first = vreinterpretq_s8_s16(vzip1q_s16(a, b));
    *second = vreinterpretq_s8_s16(vzip2q_s16(a, b));
  }
};

}  // namespace
