// The C interface of the kernels: append, dequantize, rewind and decode attention over the quantized cache, independent
// of any framework. Tests call it through ctypes; ort/kernel_cpu.cc calls it from ONNX Runtime. The CUDA kernels have
// the same functions with the prefix `skv_cuda_` and a stream (cuda/kernels_cuda.h).
//
// Every function checks its arguments before it writes anything, returns SKV_OK or an SkvStatus, and leaves the reason
// (what, got, expected) in skv_last_error() of the calling thread. Nothing outside the given buffers is read or
// written.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kv_layout.h"

#if defined(_WIN32)
#define SKV_API __declspec(dllexport)
#else
#define SKV_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum SkvStatus {
  SKV_OK = 0,
  SKV_INVALID_ARGUMENT = 1,
  SKV_NOT_SUPPORTED = 2,
  SKV_RUNTIME_ERROR = 3,
} SkvStatus;

// Runs body(context, i) for i in [0, count), possibly on several threads; null = on the calling thread, in order.
typedef void (*SkvParallelFor)(void* pool, void (*body)(void* context, size_t i), size_t count, void* context);
typedef struct SkvThreads {
  SkvParallelFor run;
  void* pool;
  int32_t num_threads;
} SkvThreads;

// The blocks of a batch: block (b, h) starts at data + (b * kv_num_heads + h) * block_bytes, on a 16-byte boundary.
typedef struct SkvCache {
  SkvLayout layout;
  uint8_t* data;
  int64_t block_bytes;  // a multiple of 16
  SkvKeyBasis basis;    // of keys; with granularity channel, no rotation, and fewer than 16 bits
} SkvCache;

// New tokens [batch][tokens][heads][head_dim] of `type`; token (b, t) starts at data + (b * tokens + t) * token_stride.
typedef struct SkvTokens {
  const void* data;
  int64_t token_stride;  // elements; heads * head_dim, or more inside packed QKV
} SkvTokens;

// One call of the op on its new tokens, after RoPE and QK norm.
typedef struct SkvAttention {
  SkvCache key_cache, value_cache;
  SkvTokens query, key, value;
  void* output;                  // [batch][tokens][num_heads][head_dim] of `type`
  const int32_t* seqlens_k;      // [batch], total length after this call minus 1
  const int32_t* query_seqlens;  // [batch] or null = min(tokens, total length)
  const void* head_sink;         // [num_heads] of `type`, or null
  int32_t type;                  // SkvType: the CPU takes SKV_FLOAT and SKV_FLOAT16
  int32_t batch, tokens;
  int32_t num_heads, kv_num_heads;
  float scale;    // 0 = 1 / sqrt(head_dim)
  float softcap;  // 0 = none
  int32_t*
      not_finite;  // out: 1 if a number of the new keys or values was not finite and stored as 0, else 0; may be null
} SkvAttention;

// Attention of the new tokens to each other, exactly, and to the past through the caches; then appends them.
// Any number of tokens; meant for few (prompts go through GroupQueryAttention, see ort/kernel_cpu.cc).
SKV_API int skv_attention(const SkvAttention* call, const SkvThreads* threads);

// The same, and appends nothing: the caches are read only.
SKV_API int skv_attend(const SkvAttention* call, const SkvThreads* threads);

// Appends keys and values only (query, output, head_sink are not looked at).
SKV_API int skv_append(const SkvAttention* call, const SkvThreads* threads);

// Writes the first `length` tokens of sequence b, head h as rows [length][row_stride] of `type`, in the model's basis
// (rotated back, head_dim channels); positions that a sliding window's ring has forgotten are written as zeros.
SKV_API int skv_dequantize(const SkvCache* cache, int32_t kv_num_heads, int32_t b, int32_t h, int64_t length,
                           int32_t type, void* out, int64_t row_stride);

// The op's own view of the tiles: T rows [T][D] in float32 from one tile's bytes, in the tile's basis.
SKV_API int skv_decode_tile(const SkvLayout* layout, const uint8_t* tile, float* out);

// Makes the blocks of sequence b a cache of new_length tokens (reference.rewind): at most recent_tokens back.
// longest_length: most tokens that the sequence has held since it was empty, `length` if it was never rewound; rows and
// a sliding window's tiles are overwritten up to there.
SKV_API int skv_rewind(const SkvCache* cache, int32_t kv_num_heads, int32_t b, int64_t length, int64_t longest_length,
                       int64_t new_length);

// Sizes, for the test that compares kv_layout.h with spec/layout.py: out[0..5] = tile_bytes, row_bytes, full_rows,
// tiles in block_bytes, capacity (-1 = any), quantized tokens at `length`.
SKV_API int skv_layout_sizes(const SkvLayout* layout, int64_t block_bytes, int64_t length, int64_t out[6]);

// The instruction set that was chosen: "scalar", "avx2", "avxvnni", "avx512vnni", "neon". SKV_CPU_ISA=name in the
// environment picks a lesser one.
SKV_API const char* skv_cpu_isa(void);

// "", or the CUDA version and architectures that this library was built with.
SKV_API const char* skv_cuda_build(void);

// The library's version, and the reason of the calling thread's last failure ("" if none).
SKV_API const char* skv_version(void);
SKV_API const char* skv_last_error(void);

#ifdef __cplusplus
}
#endif
