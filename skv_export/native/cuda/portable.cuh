// The differences between nvcc and g++: everything else in this folder compiles with both, and runs on the CPU with the
// tests' shim (tests/cuda/cuda_shim.h). Wraps the instructions for which CUDA C++ has no function.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SKV_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "cuda_shim.h"

#define SKV_DYNAMIC_SHARED(name) unsigned char* name = reinterpret_cast<unsigned char*>(shim::block().shared)
#endif

#define SKV_DEVICE __device__ __forceinline__
#define SKV_CONSTANT static constexpr __host__ __device__

namespace skv::cuda {

constexpr uint32_t kWarp = 0xffffffffu;

#ifdef __CUDACC__

// D += A B; A 16x16 and B 16x8 in fp16, D in fp32.
SKV_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Transposes an 8x8 matrix of 16-bit elements across the warp.
SKV_DEVICE uint32_t transpose8x8(uint32_t a) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

SKV_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// (a & mask) | rest in one LOP3, which the compiler alone does not always find.
SKV_DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t rest) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(rest));
  return r;
}

// A constant in a register, kept from being folded into each use (LOP3 takes one immediate only).
SKV_DEVICE uint32_t in_register(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 16 bytes from global to shared memory, in the background.
SKV_DEVICE void async_copy16(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// Asks for the line of 128 bytes at an address.
SKV_DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }
SKV_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
SKV_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

#ifndef __CUDACC_RTC__
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
                   Parameters... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Whether the library holds code for the current device.
template <class... Parameters>
cudaError_t can_run(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}
#endif

#else

using shim::async_commit;
SKV_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHIM_LINE) {
  shim::mma_m16n8k16(d, a, b, line);
}
SKV_DEVICE uint32_t transpose8x8(uint32_t a, SHIM_LINE) { return shim::movmatrix_trans(a, line); }
SKV_DEVICE float fast_exp2(float x) { return std::exp2(x); }
SKV_DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t rest) { return (a & mask) | rest; }
SKV_DEVICE uint32_t in_register(uint32_t x) { return x; }
SKV_DEVICE void async_copy16(void* shared, const void* global) { shim::async_copy(shared, global, 16); }
SKV_DEVICE void prefetch(const void*) {}
template <int Pending>
SKV_DEVICE void async_wait() {
  shim::async_wait(Pending);
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
                   Parameters... arguments) {
  shim::launch(stream, grid, threads, shared_bytes, kernel, arguments...);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t can_run(void (*)(Parameters...)) {
  return shim::no_code();
}

#endif

SKV_DEVICE uint32_t bits_of(half2 h) {
  uint32_t u;
  memcpy(&u, &h, 4);
  return u;
}
SKV_DEVICE half2 half2_of(uint32_t u) {
  half2 h;
  memcpy(&h, &u, 4);
  return h;
}

}  // namespace skv::cuda
