// Dequantization on the device: rows of a sequence, one tile, and rewind. Exactly as reference.load.
#include "launchers.h"

namespace skv::cuda {
namespace {

template <int E>
SKV_DEVICE void write(const Rows& rows, int64_t sequence_and_head, int position, const float (&x)[E]) {
  const int lane = threadIdx.x % 32;
  const int64_t start = (sequence_and_head * rows.head_stride + position) * rows.row_stride;
#pragma unroll
  for (int e = 0; e < E; e++) {
    const int d = lane + 32 * e;
    if (d < rows.channels) store(rows.data, start + d, rows.type, rows.type == SKV_FLOAT16 ? saturated(x[e]) : x[e]);
  }
}

// Grid: groups of kWarps positions.
template <int E>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(Cache c, Rows rows, int64_t sequence_and_head, int head, int length) {
  const uint8_t* block = block_of(c, sequence_and_head);
  for (int position = blockIdx.x * kWarps + threadIdx.x / 32; position < length; position += gridDim.x * kWarps) {
    float x[E];
    load_position(c, block, length, position, x);
    if (c.basis.query && is_in_tile(c, length, position)) from_tile(x, c, head);
    rotate(x, c);
    write(rows, 0, position, x);
  }
}

// Grid: groups of kWarps positions, sequence and head, keys or values.
template <int E>
__global__ void __launch_bounds__(kThreads)
    dequantize_all_kernel(Attention a, Rows keys, Rows values, int first, bool zero_not_numbers) {
  const bool is_value = blockIdx.z != 0;
  const Cache& c = is_value ? a.value : a.key;
  const int b = first + blockIdx.y / a.kv_num_heads, head = blockIdx.y % a.kv_num_heads;
  const Sequence s = sequence(a.lengths, b, a.key, a.value);
  if (!s.valid || s.fresh == 0) return;
  const uint8_t* block = block_of(c, int64_t{b} * a.kv_num_heads + head);
  for (int position = blockIdx.x * kWarps + threadIdx.x / 32; position < s.total; position += gridDim.x * kWarps) {
    float x[E];
    if (position < s.past) {
      load_position(c, block, s.past, position, x);
      if (c.basis.query && is_in_tile(c, s.past, position)) from_tile(x, c, head);
      rotate(x, c);
    } else {
      load_token(is_value ? a.new_value : a.new_key, int64_t{b} * a.lengths.tokens + position - s.past, head, x);
#pragma unroll
      for (int e = 0; e < E; e++) x[e] = zero_not_numbers && is_value && is_nan(x[e]) ? 0.f : x[e];
    }
    write(is_value ? values : keys, blockIdx.y, position, x);
  }
}

// Grid: groups of kWarps new tokens, sequence and head. A warp looks at one new value, and where something of it is not
// a number, neither is that of the outputs which see it.
template <int E>
__global__ void __launch_bounds__(kThreads) spread_not_numbers_kernel(Attention a) {
  const int b = blockIdx.y / a.kv_num_heads, head = blockIdx.y % a.kv_num_heads;
  const Sequence s = sequence(a.lengths, b, a.key, a.value);
  const int from = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!s.valid || from >= s.fresh) return;
  float x[E];
  const int64_t first_token = int64_t{b} * a.lengths.tokens;
  if (!load_not_numbers(a.new_value, first_token + from, head, a.value, x)) return;
  const int end = a.window > 0 && from + a.window < s.fresh ? from + a.window : s.fresh;
  const int head_dim = a.value.layout.head_dim;
  for (int token = from; token < end; token++) {
    for (int i = 0; i < a.group(); i++) {
      const int64_t row = ((first_token + token) * a.num_heads + head * a.group() + i) * head_dim;
      for (int e = 0; e < E; e++) {
        const int d = lane + 32 * e;
        if (d < head_dim && is_nan(x[e])) store(a.output, row + d, a.output_type, x[e]);
      }
    }
  }
}

// One thread per sequence.
__global__ void __launch_bounds__(kThreads) dense_lengths_kernel(Attention a, int32_t* lengths) {
  const int b = blockIdx.x * kThreads + threadIdx.x;
  if (b >= a.batch) return;
  const Sequence s = sequence(a.lengths, b, a.key, a.value);
  lengths[b] = (s.valid ? s.past : 0) + a.lengths.tokens - 1;
}

// Grid: tokens, sequences.
__global__ void __launch_bounds__(kThreads) clear_padding_kernel(Attention a) {
  const int b = blockIdx.y;
  const Sequence s = sequence(a.lengths, b, a.key, a.value);
  const int64_t width = int64_t{a.num_heads} * a.value.layout.head_dim;
  const int first = s.valid ? s.fresh : 0;
  for (int token = first + blockIdx.x; token < a.lengths.tokens; token += gridDim.x) {
    const int64_t start = (int64_t{b} * a.lengths.tokens + token) * width;
    for (int64_t i = threadIdx.x; i < width; i += kThreads)
      store(a.output, start + i, a.output_type, s.valid ? 0 : NAN);
  }
}

// Grid: groups of kWarps tokens of the tile.
template <int E>
__global__ void __launch_bounds__(kThreads) decode_tile_kernel(Cache c, const uint8_t* tile, float* out) {
  const int t = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  float x[E];
  decode_token(c, tile, t, x);
#pragma unroll
  for (int e = 0; e < E; e++) out[t * c.dim + lane + 32 * e] = x[e];
}

// Grid: groups of kWarps tokens that leave their tiles and have no rows, heads.
template <int E>
__global__ void __launch_bounds__(kThreads) rewind_kernel(Cache c, int64_t first_block, int from, int to) {
  uint8_t* block = block_of(c, first_block + blockIdx.y);
  const int lane = threadIdx.x % 32, sinks = c.layout.num_sink_tokens, tokens = c.layout.tile_tokens;
  for (int position = from + blockIdx.x * kWarps + threadIdx.x / 32; position < to; position += gridDim.x * kWarps) {
    const int tile = (position - sinks) / tokens;
    float x[E];
    decode_token(c, block + tile_start(c, tile), (position - sinks) % tokens, x);
    if (c.basis.query) from_tile(x, c, blockIdx.y);
    uint8_t* row = block + row_start(c, position);
#pragma unroll
    for (int e = 0; e < E; e++) store(row, lane + 32 * e, c.layout.recent_type, x[e]);
  }
}

unsigned groups_of_warps(int64_t tokens) {
  const int64_t groups = (tokens + kWarps - 1) / kWarps;
  return unsigned(groups < 1 ? 1 : groups < 4096 ? groups : 4096);
}

}  // namespace

cudaError_t dequantize(const Cache& cache, const Rows& rows, int64_t sequence, int32_t kv_num_heads, int32_t head,
                       int32_t length, void* stream) {
  return with_channels(cache, [&](auto channels) {
    return launch(dequantize_kernel<decltype(channels)::value>, dim3(groups_of_warps(length)), kThreads, 0, stream,
                  cache, rows, sequence * kv_num_heads + head, head, length);
  });
}

cudaError_t dequantize_all(const Attention& a, const Rows& keys, const Rows& values, int32_t first, int32_t count,
                           bool zero_not_numbers, void* stream) {
  return with_channels(a.key, [&](auto channels) {
    const dim3 grid(groups_of_warps(a.lengths.max_length), count * a.kv_num_heads, 2);
    return launch(dequantize_all_kernel<decltype(channels)::value>, grid, kThreads, 0, stream, a, keys, values, first,
                  zero_not_numbers);
  });
}

cudaError_t spread_not_numbers(const Attention& a, void* stream) {
  return with_channels(a.key, [&](auto channels) {
    const dim3 grid((a.lengths.tokens + kWarps - 1) / kWarps, a.batch * a.kv_num_heads);
    return launch(spread_not_numbers_kernel<decltype(channels)::value>, grid, kThreads, 0, stream, a);
  });
}

cudaError_t dense_lengths(const Attention& a, int32_t* lengths, void* stream) {
  return launch(dense_lengths_kernel, dim3((a.batch + kThreads - 1) / kThreads), kThreads, 0, stream, a, lengths);
}

cudaError_t clear_padding(const Attention& a, void* stream) {
  const unsigned tokens = a.lengths.tokens < 256 ? a.lengths.tokens : 256;
  return launch(clear_padding_kernel, dim3(tokens, a.batch), kThreads, 0, stream, a);
}

cudaError_t decode_tile(const SkvLayout& layout, const uint8_t* tile, float* out, void* stream) {
  const Cache cache = make_cache({layout, nullptr, full_bytes(layout) + tile_bytes(layout), {}});
  return with_channels(cache, [&](auto channels) {
    return launch(decode_tile_kernel<decltype(channels)::value>, dim3(layout.tile_tokens / kWarps), kThreads, 0, stream,
                  cache, tile, out);
  });
}

cudaError_t rewind(const Cache& cache, int32_t kv_num_heads, int32_t b, int32_t from, int32_t to, void* stream) {
  return with_channels(cache, [&](auto channels) {
    return launch(rewind_kernel<decltype(channels)::value>, dim3(groups_of_warps(to - from), kv_num_heads), kThreads, 0,
                  stream, cache, int64_t{b} * kv_num_heads, from, to);
  });
}

}  // namespace skv::cuda
