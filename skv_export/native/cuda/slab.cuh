// Tiles to rows: 32 tokens of a tile at a time, dequantized by a block. Exactly as reference.decode_tile.
//
// Lane t of a warp has token t of the slab, and 32 channels of it at once: words of a plane are read by neighbouring
// lanes side by side, nothing is divided, and the rotation's first five steps stay in a lane's registers. The rows then
// stand in shared memory, from where eight lanes take one together.
#pragma once
#include "device.cuh"

namespace skv::cuda {

constexpr int kSlabTokens = 32;

template <int E>
struct Slab {
  static constexpr int kStride = 32 * E + 4;  // floats: rows are read and written in pieces of 16 bytes
  float rows[kSlabTokens][kStride];
  float scale[32 * E], offset[32 * E];  // of channels; offset: their means with granularity token_channel
};

// Adds 32 channels' fields of a plane of `Width` bits, `left` bits up, to their codes.
template <int Width>
SKV_DEVICE void add_plane(const Cache& c, const uint8_t* plane, int token, int group, int left, uint32_t (&codes)[32]) {
  constexpr uint32_t kMask = (1u << Width) - 1;
  const int tokens = c.layout.tile_tokens;
  if (c.layout.is_value) {  // a word has the same byte of four tokens, as many fields as a byte has
    const int row_bytes = c.dim * Width / 8, shift = token % 4 * 8;
    const uint4* from = reinterpret_cast<const uint4*>(plane + (token / 4 * row_bytes + group * 4 * Width) * 4);
#pragma unroll
    for (int i = 0; i < Width; i++) {
      const uint4 u = from[i];
      const uint32_t words[4] = {u.x >> shift, u.y >> shift, u.z >> shift, u.w >> shift};
#pragma unroll
      for (int f = 0; f < 32 / Width; f++) {
        codes[i * (32 / Width) + f] |= (words[f * Width / 8] >> (f * Width % 8) & kMask) << left;
      }
    }
  } else {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(plane) + group * Width * tokens + token;
#pragma unroll
    for (int i = 0; i < Width; i++) {
      const uint32_t word = from[i * tokens];
#pragma unroll
      for (int f = 0; f < 32 / Width; f++) codes[i * (32 / Width) + f] |= (word >> (f * Width) & kMask) << left;
    }
  }
}

// 32 channels of a tile's token.
SKV_DEVICE void decode_channels(const Cache& c, const uint8_t* tile, int token, int group, const float* scale,
                                const float* offset, float (&x)[32]) {
  const SkvLayout& l = c.layout;
  if (l.bits == 16) {
#pragma unroll
    for (int i = 0; i < 32; i++) x[i] = load(tile, token * c.dim + 32 * group + i, l.recent_type);
    return;
  }
  uint32_t codes[32] = {};
  const uint8_t* plane = tile;
  const int plane_bytes = l.tile_tokens * (c.dim / 8);  // of each bit
  int left = l.bits;
  if (left >= 8) add_plane<8>(c, plane, token, group, left -= 8, codes), plane += 8 * plane_bytes;
  if (left >= 4) add_plane<4>(c, plane, token, group, left -= 4, codes), plane += 4 * plane_bytes;
  if (left >= 2) add_plane<2>(c, plane, token, group, left -= 2, codes), plane += 2 * plane_bytes;
  if (left >= 1) add_plane<1>(c, plane, token, group, left -= 1, codes);
  if (l.granularity == SKV_CHANNEL) {
#pragma unroll
    for (int i = 0; i < 32; i++) x[i] = __fadd_rn(__fmul_rn(float(codes[i]), scale[i]), offset[i]);
    return;
  }
  const half* scales = reinterpret_cast<const half*>(tile + c.code_bytes);
  const float of_token = __half2float(scales[(group * c.per_group >> 16) * l.tile_tokens + token]);
  const float middle = float((1 << l.bits) - 1) / 2;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    x[i] = __fmul_rn(__fsub_rn(float(codes[i]), middle), of_token);
    if (c.means) x[i] = __fadd_rn(x[i], offset[i]);
  }
}

// Steps 1 ... 16 of reference.rotate, of one lane's channels.
SKV_DEVICE void rotate_32(float (&x)[32]) {
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      if (i & stride) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = __fadd_rn(a, b);
      x[i + stride] = __fsub_rn(a, b);
    }
  }
}

// Tokens [first, first + 32) of a tile to slab.rows, rotated but for the steps from 32 on. All threads of a block.
template <int E>
SKV_DEVICE void decode_slab(const Cache& c, const uint8_t* tile, int first, Slab<E>& slab) {
  const int lane = threadIdx.x % 32;
  for (int d = threadIdx.x; c.layout.bits != 16 && d < 32 * E; d += kThreads) {
    if (c.layout.granularity == SKV_CHANNEL) {
      const ChannelParameters channel(c, tile + c.code_bytes, d);
      slab.scale[d] = channel.scale;
      slab.offset[d] = channel.offset;
    } else if (c.means) {
      slab.offset[d] = stored_mean(c, tile, d);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int group = threadIdx.x / 32; group < E; group += kWarps) {
    float x[32];
    decode_channels(c, tile, first + lane, group, slab.scale + 32 * group, slab.offset + 32 * group, x);
    if (c.rotation_dim) rotate_32(x);
    uint4* to = reinterpret_cast<uint4*>(slab.rows[lane] + 32 * group);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      to[i / 4] = make_uint4(__float_as_uint(x[i]), __float_as_uint(x[i + 1]), __float_as_uint(x[i + 2]),
                             __float_as_uint(x[i + 3]));
    }
  }
  __syncthreads();
}

// Steps from 32 on: x[e] has channels 32 e + 4 j ... 32 e + 4 j + 3 of a token, j = lane % 8.
template <int E>
SKV_DEVICE void finish_rotation(float (&x)[E][4], int block, float scale) {
#pragma unroll
  for (int step = 1; step < E; step *= 2) {
    if (32 * step >= block) break;
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (e & step || (e | step) >= E) continue;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float a = x[e][i], b = x[e | step][i];
        x[e][i] = __fadd_rn(a, b);
        x[e | step][i] = __fsub_rn(a, b);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < E; e++) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[e][i] = __fmul_rn(x[e][i], scale);
  }
}

}  // namespace skv::cuda
