// Dequantization on the device: rows of a sequence, one tile, and rewind. Exactly as reference.load.
#include "launchers.h"
#include "slab.cuh"

namespace skv::cuda {
namespace {

// Where the rows of one sequence and head go.
struct Target {
  Rows rows;
  int64_t start;  // position 0

  SKV_DEVICE void one(int position, int d, float x) const {
    if (d >= rows.channels) return;
    store(rows.data, start + position * rows.row_stride + d, rows.type, rows.type == SKV_FLOAT16 ? saturated(x) : x);
  }
  template <int E>
  SKV_DEVICE void row(int position, const float (&x)[E]) const {
#pragma unroll
    for (int e = 0; e < E; e++) one(position, threadIdx.x % 32 + 32 * e, x[e]);
  }
  // Channels d ... d + 3.
  SKV_DEVICE void four(int position, int d, const float (&x)[4]) const {
    if (!rows.in_fours || rows.type == SKV_FLOAT) {
#pragma unroll
      for (int i = 0; i < 4; i++) one(position, d + i, x[i]);
      return;
    }
    if (d >= rows.channels) return;
    uint2 words;
    if (rows.type == SKV_FLOAT16) {
      words.x = bits_of(__floats2half2_rn(saturated(x[0]), saturated(x[1])));
      words.y = bits_of(__floats2half2_rn(saturated(x[2]), saturated(x[3])));
    } else {
      words.x = bfloat16_bits(x[0]) | uint32_t{bfloat16_bits(x[1])} << 16;
      words.y = bfloat16_bits(x[2]) | uint32_t{bfloat16_bits(x[3])} << 16;
    }
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(rows.data) + start + position * rows.row_stride + d) = words;
  }
};

// 32 tokens of a tile, the first of them at `position`. All threads of a block.
template <int E, bool kHasBasis>
SKV_DEVICE void write_slab(const Cache& c, const uint8_t* tile, int first, int position, int head, Slab<E>& slab,
                           const Target& to) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  decode_slab(c, tile, first, slab);
  if constexpr (kHasBasis) {  // and not rotated
    for (int t = warp; t < kSlabTokens; t += kWarps) {
      float x[E];
#pragma unroll
      for (int e = 0; e < E; e++) x[e] = slab.rows[t][lane + 32 * e];
      from_tile(x, c, head);
      to.row(position + t, x);
    }
  } else {
    for (int t = 4 * warp + lane / 8; t < kSlabTokens; t += 4 * kWarps) {
      float x[E][4];
#pragma unroll
      for (int e = 0; e < E; e++) {
        const uint4 u = *reinterpret_cast<const uint4*>(slab.rows[t] + 32 * e + 4 * (lane % 8));
        x[e][0] = __uint_as_float(u.x);
        x[e][1] = __uint_as_float(u.y);
        x[e][2] = __uint_as_float(u.z);
        x[e][3] = __uint_as_float(u.w);
      }
      if (c.rotation_dim) finish_rotation(x, c.rotation_dim, c.rotation_scale);
#pragma unroll
      for (int e = 0; e < E; e++) to.four(position + t, 32 * e + 4 * (lane % 8), x[e]);
    }
  }
  __syncthreads();  // the slab is the next one's
}

// Grid: groups of 32 positions, sequence and head. A block takes 32 positions at a time: first those in tiles, then the
// others, a warp each. `length`: of the sequence, where the host knows it; -1 = the call's. Of a call's past alone the
// rows behind it become 0.
template <int E, bool kHasBasis>
__global__ void __launch_bounds__(kThreads, 1)
    dequantize_kernel(Attention a, Rows rows, bool is_value, bool with_new, int length) {
  SKV_DYNAMIC_SHARED(shared);
  Slab<E>& slab = *reinterpret_cast<Slab<E>*>(shared);
  const Cache& c = is_value ? a.value : a.key;
  const int pair = a.first_pair + blockIdx.y, b = pair / a.kv_num_heads, head = pair % a.kv_num_heads;
  const Sequence s = length < 0 ? sequence(a.lengths, b, a.key, a.value) : Sequence{length, length, 0, true};
  if (!s.valid || (length < 0 && s.fresh == 0)) return;
  const uint8_t* block = block_of(c, pair);
  const Target to{rows, int64_t{blockIdx.y} * rows.head_stride * rows.row_stride};
  const int sinks = c.layout.num_sink_tokens, tokens = c.layout.tile_tokens, in_tiles = quantized(c.layout, s.past);
  const int slabs = in_tiles / kSlabTokens, exact = s.past - in_tiles + (with_new ? s.fresh : 0);
  const int forgotten = in_tiles / tokens - c.tiles;  // tiles of a window's ring
  for (int i = blockIdx.x; i < slabs + (exact + kSlabTokens - 1) / kSlabTokens; i += gridDim.x) {
    if (i < slabs) {
      const int first = i * kSlabTokens, tile = first / tokens, position = sinks + first;
      if (tile >= forgotten) {
        write_slab<E, kHasBasis>(c, block + tile_start(c, tile), first - tile * tokens, position, head, slab, to);
        continue;
      }
      const float nothing[E] = {};
      for (int t = threadIdx.x / 32; t < kSlabTokens; t += kWarps) to.row(position + t, nothing);
      continue;
    }
    const int first = (i - slabs) * kSlabTokens, end = first + kSlabTokens < exact ? first + kSlabTokens : exact;
    for (int index = first + threadIdx.x / 32; index < end; index += kWarps) {
      const int position = index < sinks ? index : index + in_tiles;
      float x[E];
      if (position < s.past) {
        load_row(c, block, position, x);
        rotate(x, c);
      } else {
        const int64_t token = int64_t{b} * a.lengths.tokens + position - s.past;
        load_token(is_value ? a.new_value : a.new_key, token, head, x);
#pragma unroll
        for (int e = 0; e < E; e++) x[e] = is_value && is_nan(x[e]) ? 0.f : x[e];
      }
      to.row(position, x);
    }
  }
  if (length >= 0 || with_new) return;
  const float nothing[E] = {};
  for (int64_t row = s.past + blockIdx.x * kWarps + threadIdx.x / 32; row < rows.head_stride; row += gridDim.x * kWarps)
    to.row(row, nothing);
}

// Grid: groups of kWarps tokens of the tile.
template <int E>
__global__ void __launch_bounds__(kThreads, 1) decode_tile_kernel(Cache c, const uint8_t* tile, float* out) {
  const int t = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  float x[E];
  decode_token(c, tile, t, x);
#pragma unroll
  for (int e = 0; e < E; e++) out[t * c.dim + lane + 32 * e] = x[e];
}

// Grid: groups of kWarps tokens that leave their tiles and have no rows, heads.
template <int E, bool kHasBasis>
__global__ void __launch_bounds__(kThreads, 1) rewind_kernel(Cache c, int64_t first_block, int from, int to) {
  const int position = from + blockIdx.x * kWarps + threadIdx.x / 32;
  if (position >= to) return;
  uint8_t* block = block_of(c, first_block + blockIdx.y);
  const int lane = threadIdx.x % 32, sinks = c.layout.num_sink_tokens, tokens = c.layout.tile_tokens;
  const int tile = (position - sinks) / tokens;
  float x[E];
  decode_token(c, block + tile_start(c, tile), (position - sinks) % tokens, x);
  if constexpr (kHasBasis) from_tile(x, c, blockIdx.y);
  uint8_t* row = block + row_start(c, position);
#pragma unroll
  for (int e = 0; e < E; e++) store(row, lane + 32 * e, c.layout.recent_type, x[e]);
}

cudaError_t write_rows(const Attention& a, const Rows& rows, bool is_value, bool with_new, int32_t length,
                       void* stream) {
  const int64_t most = length < 0 ? a.lengths.max_length : length, groups = most / kSlabTokens + 2;
  const dim3 grid(unsigned(groups < 4096 ? groups : 4096), a.pairs);
  const bool has_basis = !is_value && a.key.basis.query;
  return with_channels(a.key, [&](auto channels) {
    constexpr int E = decltype(channels)::value;
    const auto kernel = has_basis ? dequantize_kernel<E, true> : dequantize_kernel<E, false>;
    return launch(kernel, grid, kThreads, sizeof(Slab<E>), stream, a, rows, is_value, with_new, int(length));
  });
}

}  // namespace

cudaError_t dequantize(const Cache& cache, const Rows& rows, int64_t sequence, int32_t kv_num_heads, int32_t head,
                       int32_t length, void* stream) {
  Attention a{};
  a.key = a.value = cache;
  a.kv_num_heads = kv_num_heads;
  a.first_pair = int32_t(sequence * kv_num_heads + head);
  a.pairs = 1;
  return write_rows(a, rows, false, false, length, stream);
}

cudaError_t dequantize_all(const Attention& a, const Rows& keys, const Rows& values, bool with_new, void* stream) {
  const cudaError_t error = write_rows(a, keys, false, with_new, -1, stream);
  return error != cudaSuccess ? error : write_rows(a, values, true, with_new, -1, stream);
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
    constexpr int E = decltype(channels)::value;
    const auto kernel = cache.basis.query ? rewind_kernel<E, true> : rewind_kernel<E, false>;
    return launch(kernel, dim3((to - from + kWarps - 1) / kWarps, kv_num_heads), kThreads, 0, stream, cache,
                  int64_t{b} * kv_num_heads, from, to);
  });
}

}  // namespace skv::cuda
