// CUDA on the CPU: enough of the language and the runtime to compile the kernels' sources with g++ and to run every
// CUDA thread as a fiber. One block runs at a time, its threads in turn, switching at barriers, shuffles and votes.
//
// What it catches beyond wrong results: deadlocks and lanes that meet at different call sites (abort, with the lines);
// reads of shared memory nobody wrote (filled with NaN); copies used before cp.async.wait (they happen at the wait, not
// before); out-of-bounds accesses (-fsanitize=address: each block's shared memory is one allocation of the exact size);
// races within a block, and between the blocks of a launch (-fsanitize=thread: only barriers and launches synchronize).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#if defined(__SANITIZE_THREAD__)
#define SHIM_NO_TSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define SHIM_NO_TSAN
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// The runtime: a device with few multiprocessors, and no way to fail.
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorNotSupported = 801;
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "operation not supported" : "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace shim {

// Of a device that the library has no code for: one where SKV_SHIM_NO_CODE is set.
inline cudaError_t no_code() { return getenv("SKV_SHIM_NO_CODE") ? cudaErrorNotSupported : cudaSuccess; }

struct Block {
  dim3 index, size, grid;
  char* shared = nullptr;
};
const Block& block();
dim3 thread_index();
unsigned lane();
[[noreturn]] void die(const char* what);

// Runs `body` once per thread of the grid: at once, or in the order of a stream of runtime_shim.cc where that is
// loaded.
void launch(void* stream, dim3 grid, dim3 size, size_t shared_bytes, std::function<void()> body);

// Who wants to see launches instead of their being run: a kernel and its arguments.
using OnLaunch = void (*)(const void* kernel, const unsigned* grid, unsigned threads, size_t shared_bytes,
                          const void* const* arguments, const size_t* sizes, size_t count);
extern OnLaunch on_launch;

template <class... Parameters>
void launch(void* stream, dim3 grid, int threads, size_t shared_bytes, void (*kernel)(Parameters...),
            Parameters... arguments) {
  if (on_launch != nullptr) {
    const unsigned blocks[] = {grid.x, grid.y, grid.z};
    const void* const addresses[] = {&arguments...};
    const size_t sizes[] = {sizeof(arguments)...};
    on_launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, addresses, sizes,
              sizeof...(arguments));
    return;
  }
  launch(stream, grid, dim3(threads), shared_bytes, [=] { kernel(arguments...); });
}

// Barriers; `line` is the call site.
void block_barrier(int line);
void warp_barrier(uint32_t mask, int line);
// Every lane of the warp publishes `bytes` of `value`; returns the warp's 32 slots of 32 bytes. One warp barrier.
const unsigned char* exchange(uint32_t mask, const void* value, size_t bytes, int line);

// cp.async: copies are queued per thread and performed when waited for.
void async_copy(void* shared, const void* global, size_t bytes);
void async_commit();
void async_wait(size_t pending);

template <class T>
SHIM_NO_TSAN T slot(const unsigned char* slots, unsigned lane) {
  T value;
  memcpy(&value, slots + 32 * lane, sizeof(T));
  return value;
}
template <class T>
SHIM_NO_TSAN T shuffle(uint32_t mask, T value, unsigned source, int line) {
  static_assert(sizeof(T) <= 32 && sizeof(T) % 4 == 0);
  if (!(mask >> (source & 31) & 1)) die("shuffle source not in mask");
  return slot<T>(exchange(mask, &value, sizeof(T), line), source & 31);
}

}  // namespace shim

#define threadIdx (shim::thread_index())
#define blockIdx (shim::block().index)
#define blockDim (shim::block().size)
#define gridDim (shim::block().grid)

#define SHIM_LINE int line = __builtin_LINE()
inline void __syncthreads(SHIM_LINE) { shim::block_barrier(line); }
inline void __syncwarp(uint32_t mask = ~0u, SHIM_LINE) { shim::warp_barrier(mask, line); }
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, SHIM_LINE) {
  return shim::shuffle(mask, value, shim::lane() ^ bits, line);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, SHIM_LINE) {
  return shim::shuffle(mask, value, source, line);
}
inline int __any_sync(uint32_t mask, int predicate, SHIM_LINE) {
  const unsigned char* slots = shim::exchange(mask, &predicate, sizeof predicate, line);
  bool any = false;
  for (unsigned i = 0; i < 32; i++) any |= (mask >> i & 1) && shim::slot<int>(slots, i);
  return any;
}

// Rounded arithmetic; the shim is built with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) r |= uint32_t(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return r;
}

// fp16.
struct alignas(2) half {
  _Float16 v;
};
struct alignas(4) half2 {
  half x, y;
};
inline float __half2float(half h) { return float(h.v); }
inline half __float2half_rn(float f) { return {_Float16(f)}; }
inline half2 __floats2half2_rn(float a, float b) { return {{_Float16(a)}, {_Float16(b)}}; }
inline float2 __half22float2(half2 a) { return {float(a.x.v), float(a.y.v)}; }
inline half2 __hmul2(half2 a, half2 b) {
  return __floats2half2_rn(float(a.x.v) * float(b.x.v), float(a.y.v) * float(b.y.v));
}
inline half2 __hfma2(half2 a, half2 b, half2 c) {  // in double: one rounding, as the hardware
  return {{_Float16(double(a.x.v) * double(b.x.v) + double(c.x.v))},
          {_Float16(double(a.y.v) * double(b.y.v) + double(c.y.v))}};
}

namespace shim {

// D += A B on the fragments of PTX's mma.m16n8k16 (row, col, f16 in, f32 out).
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHIM_LINE) {
  // Published: A's 8 halves as 4 words, B's 4 as 2 words.
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* slots = exchange(~0u, mine, sizeof mine, line);
  const int row = lane() / 4, column = (lane() % 4) * 2;
  auto at = [&](unsigned source, int word, int half_index) SHIM_NO_TSAN {
    _Float16 h;
    memcpy(&h, slots + 32 * source + 4 * word + 2 * half_index, 2);
    return float(h);
  };
  for (int k = 0; k < 16; k++) {
    const int quad = (k % 8) / 2, upper = k / 8;
    const float a0 = at(row * 4 + quad, 2 * upper, k & 1), a1 = at(row * 4 + quad, 2 * upper + 1, k & 1);
    const float b0 = at(column * 4 + quad, 4 + upper, k & 1), b1 = at((column + 1) * 4 + quad, 4 + upper, k & 1);
    d[0] += a0 * b0;
    d[1] += a0 * b1;
    d[2] += a1 * b0;
    d[3] += a1 * b1;
  }
}

// Transposes an 8x8 matrix of 16-bit elements: movmatrix.m8n8.trans.b16.
inline uint32_t movmatrix_trans(uint32_t a, SHIM_LINE) {
  const unsigned char* slots = exchange(~0u, &a, sizeof a, line);
  const unsigned column = lane() / 4, row = (lane() % 4) * 2;
  const uint32_t low = slot<uint32_t>(slots, row * 4 + column / 2),
                 high = slot<uint32_t>(slots, (row + 1) * 4 + column / 2);
  const unsigned bits = 16 * (column & 1);
  return (low >> bits & 0xFFFF) | (high >> bits & 0xFFFF) << 16;
}

}  // namespace shim
