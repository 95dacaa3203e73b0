// Converts a tile's scales and offsets per channel, from 16 bits or from 8, to operands of the tensor cores.
#pragma once
#include "codes.cuh"

namespace skv::cuda {

// Parameters of channels in 8 bits are code * unit, the unit a bfloat16. Its product with 256 (scales) or 128 (offsets)
// is a half even where it is none itself; the code, which stands under the exponent of 1024, becomes the fraction of
// that.
SKV_DEVICE uint32_t unit_times(const uint8_t* unit, float factor) {
  const float x = __uint_as_float(uint32_t{*reinterpret_cast<const uint16_t*>(unit)} << 16) * factor;
  const float finite = fminf(x, 65504.f);
  return bits_of(__floats2half2_rn(finite, finite));
}
SKV_DEVICE uint32_t scale_fraction(uint32_t raw) {  // raw / 256 - 4, exactly
  return bits_of(__hfma2(half2_of(raw), half2_of(0x1C001C00), half2_of(0xC400C400)));
}
SKV_DEVICE uint32_t offset_fraction(uint32_t raw) {  // raw / 128 - 9, exactly: signs are flipped
  return bits_of(__hfma2(half2_of(raw), half2_of(0x20002000), half2_of(0xC880C880)));
}

// Scales and offsets of 16 channels from d on, in the order of the query's pairs.
template <int D, class Order>
SKV_DEVICE void load_channels(const uint8_t* parameters, int d, bool in_bytes, uint32_t half_1024,
                              uint32_t (&scales)[8], uint32_t (&offsets)[8]) {
  if (in_bytes) {
    uint32_t s[4], o[4];
    load16(parameters + d, s);
    load16(parameters + D + d, o);
    const uint8_t* unit = parameters + 2 * D + d / 32 * 2;
    const uint32_t scale = unit_times(unit, 256), offset = unit_times(unit + D / 16, 128);
#pragma unroll
    for (int i = 0; i < 4; i++) o[i] ^= kFlipSigns;
#pragma unroll
    for (int x = 0; x < 8; x++) {
      scales[x] = multiplied(scale_fraction(Order::bytes(s, x, half_1024)), scale);
      offsets[x] = multiplied(offset_fraction(Order::bytes(o, x, half_1024)), offset);
    }
  } else {
    uint32_t s[8], o[8];
    load16(parameters + 2 * d, s);
    load16(parameters + 2 * d + 16, s + 4);
    load16(parameters + 2 * (D + d), o);
    load16(parameters + 2 * (D + d) + 16, o + 4);
#pragma unroll
    for (int x = 0; x < 8; x++) {
      scales[x] = Order::pair(s, x);
      offsets[x] = Order::pair(o, x);
    }
  }
}

// The same of channels d and d + 1, in order.
template <int D>
SKV_DEVICE void load_two_channels(const uint8_t* parameters, int d, bool in_bytes, uint32_t half_1024, uint32_t& scales,
                                  uint32_t& offsets) {
  if (in_bytes) {
    const uint8_t* unit = parameters + 2 * D + d / 32 * 2;
    const uint32_t s = *reinterpret_cast<const uint16_t*>(parameters + d);
    const uint32_t o = *reinterpret_cast<const uint16_t*>(parameters + D + d) ^ (kFlipSigns & 0xffff);
    scales = multiplied(scale_fraction(__byte_perm(s, half_1024, 0x5150)), unit_times(unit, 256));
    offsets = multiplied(offset_fraction(__byte_perm(o, half_1024, 0x5150)), unit_times(unit + D / 16, 128));
  } else {
    scales = *reinterpret_cast<const uint32_t*>(parameters + 2 * d);
    offsets = *reinterpret_cast<const uint32_t*>(parameters + 2 * (D + d));
  }
}

}  // namespace skv::cuda
