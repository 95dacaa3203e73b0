// The cache's bytes in C, layout version 1 (docs/spec.md, The cache's bytes): the mirror of spec/layout.py; a test
// compares the two. Plain C structs and constexpr functions: included by the CPU kernels, the CUDA kernels and the ONNX
// Runtime side.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define SKV_HD __host__ __device__ constexpr
#else
#define SKV_HD constexpr
#endif

#define SKV_LAYOUT_VERSION 1

enum SkvGranularity { SKV_CHANNEL = 0, SKV_TOKEN = 1, SKV_TOKEN_CHANNEL = 2 };
enum SkvRotation { SKV_ROTATION_NONE = 0, SKV_HADAMARD = 1 };
enum SkvType { SKV_FLOAT16 = 0, SKV_FLOAT = 1, SKV_BFLOAT16 = 2 };

// One cache tensor, all keys or all values of a layer; fields as CacheLayout's, in its order.
typedef struct SkvLayout {
  int32_t head_dim;
  int32_t bits;
  int32_t granularity;  // SkvGranularity
  int32_t rotation;     // SkvRotation
  int32_t group_size;
  int32_t num_sink_tokens;
  int32_t recent_tokens;
  int32_t tile_tokens;
  int32_t recent_type;  // SkvType
  int32_t is_value;
  int32_t local_window_size;
  int32_t parameter_bits;  // of each scale and offset: 16, or with SKV_CHANNEL 8
} SkvLayout;

// The constants of calibrated keys (docs/spec.md, Calibrated keys): float matrices [kv_num_heads][D][D], D = head_dim
// padded. All null = none.
typedef struct SkvKeyBasis {
  const float* key;
  const float* query;
  const float* feedback;
} SkvKeyBasis;

#ifdef __cplusplus
static_assert(sizeof(SkvLayout) == 48, "SkvLayout is read through ctypes: keep it and spec/layout.py in step");

namespace skv {

SKV_HD int type_bytes(int type) { return type == SKV_FLOAT ? 4 : 2; }
SKV_HD int padded_dim(const SkvLayout& l) { return (l.head_dim + 31) / 32 * 32; }
SKV_HD int rotation_dim(const SkvLayout& l) { return padded_dim(l) & -padded_dim(l); }
SKV_HD int num_groups(const SkvLayout& l) { return padded_dim(l) / l.group_size; }
SKV_HD int64_t row_bytes(const SkvLayout& l) { return int64_t{padded_dim(l)} * type_bytes(l.recent_type); }

SKV_HD int64_t code_bytes(const SkvLayout& l) {
  return l.bits == 16 ? l.tile_tokens * row_bytes(l) : int64_t{l.tile_tokens} * padded_dim(l) * l.bits / 8;
}
// Scales and offsets in 8 bits: uint8 [D], int8 [D], then bfloat16 units [2][D/32], of the scales and of the offsets,
// each for 32 channels; what these units take, zeros included.
SKV_HD int unit_bytes(const SkvLayout& l) { return (padded_dim(l) / 8 + 15) / 16 * 16; }
SKV_HD int64_t parameter_bytes(const SkvLayout& l) {
  if (l.bits == 16) return 0;
  if (l.granularity == SKV_CHANNEL) {
    return 2 * padded_dim(l) + (l.parameter_bits == 8 ? unit_bytes(l) : 2 * padded_dim(l));
  }
  const int means = l.granularity == SKV_TOKEN_CHANNEL ? padded_dim(l) + 16 : 0;
  return int64_t{2} * num_groups(l) * l.tile_tokens + means;
}
SKV_HD int64_t tile_bytes(const SkvLayout& l) { return code_bytes(l) + parameter_bytes(l); }

SKV_HD int ring_tokens(const SkvLayout& l) { return l.recent_tokens + l.tile_tokens; }
SKV_HD int full_rows(const SkvLayout& l) { return l.num_sink_tokens + ring_tokens(l); }
SKV_HD int64_t full_bytes(const SkvLayout& l) { return full_rows(l) * row_bytes(l); }
SKV_HD int64_t window_tiles(const SkvLayout& l) {
  return l.local_window_size > 0 ? (int64_t{l.local_window_size} + l.tile_tokens - 1) / l.tile_tokens + 1 : 0;
}

// Tiles in a block of this size; negative when the block can't hold the full-precision rows.
SKV_HD int64_t tiles_in(const SkvLayout& l, int64_t block_bytes) {
  return block_bytes < full_bytes(l) ? -1 : (block_bytes - full_bytes(l)) / tile_bytes(l);
}
// Tokens that a block holds; -1 = any number (a sliding window whose ring is complete).
SKV_HD int64_t capacity(const SkvLayout& l, int64_t block_bytes) {
  const int64_t tiles = tiles_in(l, block_bytes);
  if (l.local_window_size > 0 && tiles >= window_tiles(l)) return -1;
  return tiles * l.tile_tokens + full_rows(l) - 1;
}
// n_q: tokens held in tiles once `length` tokens have been appended.
SKV_HD int64_t quantized_tokens(const SkvLayout& l, int64_t length) {
  const int64_t past_recent = length - l.num_sink_tokens - l.recent_tokens;
  return past_recent > 0 ? past_recent / l.tile_tokens * l.tile_tokens : 0;
}
// Full-precision row of a position, while it is a sink or recent.
SKV_HD int64_t full_row(const SkvLayout& l, int64_t position) {
  return position < l.num_sink_tokens ? position : l.num_sink_tokens + (position - l.num_sink_tokens) % ring_tokens(l);
}

// Smallest length to which a block can be rewound (spec/reference.py: rewind_floor). `longest`: most tokens that it has
// held since it was empty.
SKV_HD int64_t rewind_floor(const SkvLayout& l, int64_t block_bytes, int64_t length, int64_t longest) {
  if (quantized_tokens(l, length) == 0) return 0;
  const int64_t recent = length - l.recent_tokens;
  const int64_t forgotten = quantized_tokens(l, longest) / l.tile_tokens - tiles_in(l, block_bytes);
  if (forgotten <= 0) return recent;
  const int64_t needed = l.local_window_size - 1 > l.recent_tokens ? l.local_window_size - 1 : l.recent_tokens;
  const int64_t window = l.num_sink_tokens + forgotten * l.tile_tokens + needed;
  return window > recent ? window : recent;
}

}  // namespace skv
#endif
