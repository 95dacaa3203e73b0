// One call's attention as its kernels take it.
#pragma once
#include "device.cuh"

namespace skv::cuda {

constexpr int kMaxDecodeTokens = 8;  // of a sequence, that decode_mma takes

// By value.
struct Attention {
  Cache key, value;
  Tokens query, new_key, new_value;
  Tokens tile_query;  // queries in the basis of the tiles; data = null: tiles have none of their own
  Lengths lengths;
  int32_t batch, num_heads, kv_num_heads;
  int32_t columns;  // rows of queries per KV head: tokens * num_heads / kv_num_heads; column = token * group + head
  int32_t window;   // 0 = none
  float scale, softcap;
  // Per KV head of a sequence, split and column: the unnormalized output [D], and (largest score, sum of weights).
  float* partial;
  float2* peaks;
  int32_t splits;
  // Of all sequences and heads, those that a launch of prefill works on: its blockIdx.y counts from the first.
  int32_t first_pair, pairs;
  bool in_model_basis;  // what stands in partial; else in the cache's
  void* output;
  const void* head_sink;
  int32_t output_type;

  __host__ __device__ int group() const { return num_heads / kv_num_heads; }
};

}  // namespace skv::cuda
