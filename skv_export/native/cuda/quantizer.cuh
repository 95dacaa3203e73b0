// The quantizer on the device: codes and scales exactly as in spec/quantizer.py (docs/spec.md, The quantizer's
// arithmetic).
#pragma once
#include "device.cuh"

namespace skv::cuda {

// a / b, and 0 where b is not above 0.
SKV_DEVICE float divide(float a, float b) { return b > 0 ? __fdiv_rn(a, b) : 0.f; }
SKV_DEVICE float clamp(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// MSE-optimal step of a uniform mid-rise quantizer of N(0, 1), by bits.
SKV_DEVICE float midrise_step(int bits) {
  switch (bits) {
    case 1:
      return 1.596f;
    case 2:
      return 0.9957f;
    case 3:
      return 0.5860f;
    case 4:
      return 0.3352f;
    case 5:
      return 0.1881f;
    case 6:
      return 0.1041f;
    default:
      return 0.0308f;
  }
}

// Sum of x[first ... first + count - 1] over all lanes as a halving tree, padded with zeros to a power of two.
template <int E, class Term>
SKV_DEVICE float tree_sum(int first, int count, Term term) {
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; i++) y[i] = 0;
#pragma unroll
  for (int e = 0; e < E; e++) {
    const float value = term(e);
#pragma unroll
    for (int i = 0; i < E; i++) {
      if (e == first + i && i < count) y[i] = value;
    }
  }
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    if (count <= half) continue;  // nothing stands in the upper half
#pragma unroll
    for (int i = 0; i < half; i++) y[i] = __fadd_rn(y[i], y[i + half]);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) y[0] = __fadd_rn(y[0], __shfl_xor_sync(kWarp, y[0], lanes));
  return y[0];
}

// Mid-rise codes of one group, x[first ... first + count - 1] in all lanes, and its stored scale.
template <int E>
SKV_DEVICE half quantize_group(const float (&x)[E], int first, int count, int bits, float (&codes)[E]) {
  const float levels = float((1 << bits) - 1), middle = levels / 2;
  const float energy = tree_sum<E>(first, count, [&](int e) { return __fmul_rn(x[e], x[e]); });
  float scale = __fmul_rn(__fsqrt_rn(__fdiv_rn(energy, float(32 * count))), midrise_step(bits));
  auto code = [&](int e) { return clamp(rintf(__fadd_rn(divide(x[e], scale), middle)), 0.f, levels); };
  for (int round = 0; round < 2; round++) {
    const float xq = tree_sum<E>(first, count, [&](int e) { return __fmul_rn(x[e], code(e) - middle); });
    const float qq = tree_sum<E>(first, count, [&](int e) { return __fmul_rn(code(e) - middle, code(e) - middle); });
    scale = divide(xq, qq);
  }
  const float xq = tree_sum<E>(first, count, [&](int e) { return __fmul_rn(x[e], code(e) - middle); });
  const float stored = divide(energy, xq);
  const bool empty = !(stored > 0);
#pragma unroll
  for (int e = 0; e < E; e++) {
    if (e >= first && e < first + count) codes[e] = empty ? float(1 << (bits - 1)) : code(e);
  }
  return __float2half_rn(empty ? 0.f : saturated(stored));
}

// A number of each of 32 channels in 8 bits, `code * unit`: signed codes are rounded down, unsigned ones up, the unit
// is a bfloat16 (reference._channels_in_bytes). A whole warp.
template <class Code>
struct InBytes {
  uint16_t unit;
  float code;

  SKV_DEVICE explicit InBytes(float x) : unit(), code() {
    constexpr bool kSigned = Code(-1) < 0;
    constexpr float kLow = kSigned ? -128.f : 0.f, kHigh = kSigned ? 127.f : 255.f;
    float largest = fabsf(x);
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, lanes));
    unit = bfloat16_bits(__fdiv_rn(largest, kHigh));
    const float quotient = divide(x, load(&unit, 0, SKV_BFLOAT16));
    code = clamp(kSigned ? floorf(quotient) : ceilf(quotient), kLow, kHigh);
  }
  SKV_DEVICE float value() const { return __fmul_rn(code, load(&unit, 0, SKV_BFLOAT16)); }
  SKV_DEVICE uint8_t byte() const { return uint8_t(Code(code)); }
};

// The unit of a tile's means, from the largest, and the 8-bit code of one.
struct MeanGrid {
  half unit;

  SKV_DEVICE explicit MeanGrid(float largest) : unit() { unit = __float2half_rn(saturated(__fdiv_rn(largest, 127.f))); }
  SKV_DEVICE float code(float mean) const { return clamp(rintf(divide(mean, __half2float(unit))), -127.f, 127.f); }
};

}  // namespace skv::cuda
