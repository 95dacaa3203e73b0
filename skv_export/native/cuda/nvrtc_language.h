// What stands for the standard library's and CUDA's headers where NVRTC compiles the kernels: it is given none.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;

#define INFINITY __int_as_float(0x7f800000)

// cuda_fp16.h's types and functions, of which each is one instruction.
struct alignas(2) half {
  uint16_t bits;
};
struct alignas(4) half2 {
  half x, y;
};

__device__ __forceinline__ uint32_t skv_bits(half2 h) { return h.x.bits | uint32_t{h.y.bits} << 16; }
__device__ __forceinline__ half2 skv_half2(uint32_t bits) { return {{uint16_t(bits)}, {uint16_t(bits >> 16)}}; }

__device__ __forceinline__ float __half2float(half h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
}
__device__ __forceinline__ half __float2half_rn(float f) {
  half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
  return h;
}
__device__ __forceinline__ half2 __floats2half2_rn(float a, float b) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(b), "f"(a));
  return skv_half2(bits);
}
__device__ __forceinline__ float2 __half22float2(half2 h) { return make_float2(__half2float(h.x), __half2float(h.y)); }
__device__ __forceinline__ half2 __hmul2(half2 a, half2 b) {
  uint32_t bits;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(bits) : "r"(skv_bits(a)), "r"(skv_bits(b)));
  return skv_half2(bits);
}
__device__ __forceinline__ half2 __hfma2(half2 a, half2 b, half2 c) {
  uint32_t bits;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(bits) : "r"(skv_bits(a)), "r"(skv_bits(b)), "r"(skv_bits(c)));
  return skv_half2(bits);
}
