// Shared by the kernels: the cache on the device, the lengths of a sequence, and rows of channels held by a warp.
//
// A row of D channels lies in a warp as x[E], E = D / 32: lane l holds channels l, l + 32, ... Sums and rotations over
// such a row take their operands in the order of spec/reference.py, with every operation rounded on its own.
#pragma once
#include "../kv_layout.h"
#include "portable.cuh"

namespace skv::cuda {

// Of every kernel but decode_mma. Their launch bounds say "and one block per multiprocessor": ptxas takes the registers
// it needs then, and spills none.
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxDim = 256;

// One cache tensor with the numbers that kernels would otherwise divide for.
struct Cache {
  SkvLayout layout;
  uint8_t* data;
  int64_t block_bytes, tile_bytes, code_bytes, rows_start;
  int32_t means;  // where a tile's means stand, int8 [dim] and their float16 unit; 0 = none
  int32_t parameter_bytes;
  int32_t dim, tiles, capacity;  // capacity: -1 = any length
  int32_t ring, groups;
  int32_t per_group;     // (32 channels' number * this) >> 16 is their group
  int32_t rotation_dim;  // 0 = not rotated
  float rotation_scale;
  SkvKeyBasis basis;
};

SKV_DEVICE int quantized(const SkvLayout& l, int length) {
  const int past_recent = length - l.num_sink_tokens - l.recent_tokens;
  return past_recent > 0 ? past_recent / l.tile_tokens * l.tile_tokens : 0;
}
SKV_DEVICE int row_of(const Cache& c, int position) {
  const int sinks = c.layout.num_sink_tokens;
  return position < sinks ? position : sinks + (position - sinks) % c.ring;
}
SKV_DEVICE int64_t row_start(const Cache& c, int position) {
  return c.rows_start + int64_t{row_of(c, position)} * c.dim * type_bytes(c.layout.recent_type);
}
SKV_DEVICE uint8_t* block_of(const Cache& c, int64_t sequence_and_head) {
  return c.data + sequence_and_head * c.block_bytes;
}
SKV_DEVICE int64_t tile_start(const Cache& c, int tile) { return tile % c.tiles * c.tile_bytes; }

// The lengths of one sequence, read on the device.
struct Lengths {
  const int32_t* seqlens_k;
  const int32_t* query_seqlens;
  int32_t tokens;
  int32_t max_length;  // what scratch has room for
};
struct Sequence {
  int past, total, fresh;
  bool valid;
};
SKV_DEVICE Sequence sequence(const Lengths& l, int b, const Cache& k, const Cache& v) {
  const int64_t total = int64_t{l.seqlens_k[b]} + 1;
  const int most = total < l.tokens ? int(total) : l.tokens;
  const int fresh = l.query_seqlens ? l.query_seqlens[b] : most;
  const bool fits = (k.capacity < 0 || total <= k.capacity) && (v.capacity < 0 || total <= v.capacity);
  const bool valid = total >= 0 && total <= l.max_length && fresh >= 0 && fresh <= most && fits;
  return {int(total) - fresh, int(total), fresh, valid};
}

// Elements of a type as floats.
SKV_DEVICE float load(const void* data, int64_t i, int type) {
  if (type == SKV_FLOAT) return static_cast<const float*>(data)[i];
  if (type == SKV_FLOAT16) return __half2float(static_cast<const half*>(data)[i]);
  return __uint_as_float(uint32_t{static_cast<const uint16_t*>(data)[i]} << 16);
}
SKV_DEVICE uint16_t bfloat16_bits(float x) {
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
SKV_DEVICE void store(void* data, int64_t i, int type, float x) {
  if (type == SKV_FLOAT) {
    static_cast<float*>(data)[i] = x;
  } else if (type == SKV_FLOAT16) {
    static_cast<half*>(data)[i] = __float2half_rn(x);
  } else {
    static_cast<uint16_t*>(data)[i] = bfloat16_bits(x);
  }
}
SKV_DEVICE bool is_nan(float x) { return x != x; }
// float16 with the largest finite values instead of infinity: reference.to_half. Not-a-number stays one.
SKV_DEVICE float saturated(float x) { return is_nan(x) ? x : fminf(fmaxf(x, -65504.f), 65504.f); }
SKV_DEVICE float rounded_to(int type, float x) {
  if (type == SKV_FLOAT) return x;
  if (type == SKV_FLOAT16) return __half2float(__float2half_rn(saturated(x)));
  return __uint_as_float(uint32_t{bfloat16_bits(x)} << 16);
}
SKV_DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000) != 0x7f800000; }

// Normalized Walsh-Hadamard transform of each `block` channels of a row: reference.rotate.
template <int E>
SKV_DEVICE void rotate(float (&x)[E], int block, float scale) {
  const int lane = threadIdx.x % 32;
  for (int stride = 1; stride < 32 && stride < block; stride *= 2) {
#pragma unroll
    for (int e = 0; e < E; e++) {
      const float other = __shfl_xor_sync(kWarp, x[e], stride);
      x[e] = lane & stride ? __fsub_rn(other, x[e]) : __fadd_rn(x[e], other);
    }
  }
#pragma unroll
  for (int step = 1; step < E; step *= 2) {
    if (32 * step >= block) break;
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (e & step || (e | step) >= E) continue;
      const float a = x[e], b = x[e | step];
      x[e] = __fadd_rn(a, b);
      x[e | step] = __fsub_rn(a, b);
    }
  }
#pragma unroll
  for (int e = 0; e < E; e++) x[e] = __fmul_rn(x[e], scale);
}
template <int E>
SKV_DEVICE void rotate(float (&x)[E], const Cache& c) {
  if (c.rotation_dim) rotate(x, c.rotation_dim, c.rotation_scale);
}

// New tokens [batch][tokens][heads][head_dim].
struct Tokens {
  const void* data;
  int64_t token_stride;
  int32_t type, head_dim;
};
template <int E>
SKV_DEVICE void load_token(const Tokens& t, int64_t token, int head, float (&x)[E]) {
  const int lane = threadIdx.x % 32;
  const int64_t start = token * t.token_stride + int64_t{head} * t.head_dim;
  if (t.type == SKV_FLOAT) {
    const float* from = static_cast<const float*>(t.data) + start + lane;
#pragma unroll
    for (int e = 0; e < E; e++) x[e] = lane + 32 * e < t.head_dim ? from[32 * e] : 0.f;
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(t.data) + start + lane;
  uint16_t bits[E];  // all loads before the first is used
#pragma unroll
  for (int e = 0; e < E; e++) bits[e] = lane + 32 * e < t.head_dim ? from[32 * e] : uint16_t{0};
#pragma unroll
  for (int e = 0; e < E; e++) x[e] = load(bits, e, t.type);
}

// A new value in the cache's basis, of which a kernel takes for 0 what is not a number: its weight of 0 where it is not
// seen would not hide it. Returns whether there is any such channel, the same for the whole warp; x says which.
template <int E>
SKV_DEVICE bool load_not_numbers(const Tokens& values, int64_t token, int head, const Cache& c, float (&x)[E]) {
  load_token(values, token, head, x);
  bool any = false;
#pragma unroll
  for (int e = 0; e < E; e++) any |= is_nan(x[e]);
  if (!__any_sync(kWarp, any)) return false;
  rotate(x, c);
  return true;
}

// A row times a matrix [32 E][32 E] whose elements stand so far apart by the row's and by the product's channel: sums
// in the order of the row's channels (reference: _products). Whole warps.
template <int E>
SKV_DEVICE void multiply(float (&x)[E], const float* matrix, int by_row, int by_product) {
  const int lane = threadIdx.x % 32;
  float product[E] = {};
#pragma unroll
  for (int from = 0; from < E; from++) {
#pragma unroll 4  // whole, it takes more registers than there are
    for (int l = 0; l < 32; l++) {
      const float factor = __shfl_sync(kWarp, x[from], l);
      const float* row = matrix + (32 * from + l) * by_row;
#pragma unroll
      for (int e = 0; e < E; e++) {
        product[e] = __fadd_rn(product[e], __fmul_rn(row[(lane + 32 * e) * by_product], factor));
      }
    }
  }
#pragma unroll
  for (int e = 0; e < E; e++) x[e] = product[e];
}
SKV_DEVICE const float* of_head(const float* matrices, const Cache& c, int head) {
  return matrices + int64_t{head} * c.dim * c.dim;
}
// A key in the basis of its tile, saturated, and back.
template <int E>
SKV_DEVICE void to_tile(float (&x)[E], const Cache& c, int head) {
  multiply(x, of_head(c.basis.key, c, head), c.dim, 1);
#pragma unroll
  for (int e = 0; e < E; e++) x[e] = fminf(fmaxf(x[e], -65504.f), 65504.f);  // of what is not a number, the lower end
}
template <int E>
SKV_DEVICE void from_tile(float (&x)[E], const Cache& c, int head) {
  multiply(x, of_head(c.basis.query, c, head), 1, c.dim);
}

// A channel's scale and offset over a tile, from the tile's parameters.
struct ChannelParameters {
  float scale, offset;

  SKV_DEVICE ChannelParameters(const Cache& c, const uint8_t* parameters, int d) : scale(), offset() {
    if (c.layout.parameter_bits == 8) {
      const uint8_t* units = parameters + 2 * c.dim;
      scale = __fmul_rn(float(parameters[d]), load(units, d / 32, SKV_BFLOAT16));
      offset = __fmul_rn(float(int8_t(parameters[c.dim + d])), load(units, (c.dim + d) / 32, SKV_BFLOAT16));
    } else {
      scale = load(parameters, d, SKV_FLOAT16);
      offset = load(parameters, c.dim + d, SKV_FLOAT16);
    }
  }
};

// The mean of a channel as a tile of granularity token_channel holds it.
SKV_DEVICE float stored_mean(const Cache& c, const uint8_t* tile, int d) {
  const half unit = *reinterpret_cast<const half*>(tile + c.means + c.dim);
  return __fmul_rn(float(reinterpret_cast<const int8_t*>(tile)[c.means + d]), __half2float(unit));
}

// Token t of a tile, as reference.decode_tile.
template <int E>
SKV_DEVICE void decode_token(const Cache& c, const uint8_t* tile, int t, float (&x)[E]) {
  const SkvLayout& l = c.layout;
  const int lane = threadIdx.x % 32, tokens = l.tile_tokens;
  if (l.bits == 16) {
    for (int e = 0; e < E; e++) x[e] = load(tile, int64_t{t} * c.dim + lane + 32 * e, l.recent_type);
    return;
  }
  const half* scales = reinterpret_cast<const half*>(tile + c.code_bytes);
#pragma unroll
  for (int e = 0; e < E; e++) {
    const int d = lane + 32 * e;
    const uint8_t* plane = tile;
    uint32_t code = 0;
    for (int left = l.bits, width = 8; left > 0; width /= 2) {
      if (left < width) continue;
      const int bit = d * width;
      const uint32_t field = l.is_value ? plane[(t / 4 * (c.dim * width / 8) + bit / 8) * 4 + t % 4] >> (bit % 8)
                                        : reinterpret_cast<const uint32_t*>(plane)[bit / 32 * tokens + t] >> (bit % 32);
      left -= width;
      code |= (field & ((1u << width) - 1)) << left;
      plane += tokens * (c.dim * width / 8);
    }
    if (l.granularity == SKV_CHANNEL) {
      const ChannelParameters channel(c, tile + c.code_bytes, d);
      x[e] = __fadd_rn(__fmul_rn(float(code), channel.scale), channel.offset);
    } else {
      const float middle = float((1 << l.bits) - 1) / 2;
      x[e] = __fmul_rn(__fsub_rn(float(code), middle), __half2float(scales[d / l.group_size * tokens + t]));
      if (c.means) x[e] = __fadd_rn(x[e], stored_mean(c, tile, d));
    }
  }
}

template <int E>
SKV_DEVICE void load_row(const Cache& c, const uint8_t* block, int position, float (&x)[E]) {
  const uint8_t* row = block + row_start(c, position);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < E; e++) x[e] = load(row, lane + 32 * e, c.layout.recent_type);
}

SKV_DEVICE bool is_in_tile(const Cache& c, int length, int position) {
  const int sinks = c.layout.num_sink_tokens;
  return position >= sinks && position < sinks + quantized(c.layout, length);
}
// The token at a position of a cache of `length` tokens, in the tile's basis where it is in one; false, and zeros,
// where a sliding window's ring has forgotten it.
template <int E>
SKV_DEVICE bool load_position(const Cache& c, const uint8_t* block, int length, int position, float (&x)[E]) {
  const int sinks = c.layout.num_sink_tokens, in_tiles = quantized(c.layout, length);
  if (!is_in_tile(c, length, position)) {
    load_row(c, block, position, x);
    return true;
  }
  const int tile = (position - sinks) / c.layout.tile_tokens;
  if (tile < in_tiles / c.layout.tile_tokens - c.tiles) {
    for (int e = 0; e < E; e++) x[e] = 0;
    return false;
  }
  decode_token(c, block + tile_start(c, tile), (position - sinks) % c.layout.tile_tokens, x);
  return true;
}

}  // namespace skv::cuda
