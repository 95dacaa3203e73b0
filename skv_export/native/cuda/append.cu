// Append on the device: new tokens are rotated and rounded, tiles that leave the ring are quantized, the rest is stored
// in the full-precision rows. Writes the same bytes as reference.append. A decoding step's splits are merged by other
// blocks of the same launch.
#include "launchers.h"

#include "combine.cuh"
#include "quantizer.cuh"

namespace skv::cuda {
namespace {

struct Append {
  Attention call;
  int32_t* not_finite;
  int32_t combined;  // columns whose splits are merged beside it
  int32_t blocks;    // of keys, and as many of values
  int32_t parts;     // blocks that share a tile
  bool tiles, rows;
};

// One tensor, sequence and head.
template <int E>
struct Target {
  const Cache& cache;
  const Tokens& tokens;
  const Sequence& sequence;
  uint8_t* block;
  int b, head, max_tokens;
  int part, parts;  // of a tile, which of its groups of four tokens are this block's
  int32_t* not_finite;

  // A new token as the cache holds it: reference.stored.
  SKV_DEVICE void stored(int position, float (&x)[E]) const {
    load_token(tokens, int64_t{b} * max_tokens + (position - sequence.past), head, x);
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (is_finite(x[e])) continue;
      x[e] = 0;
      if (not_finite) *not_finite = 1;
    }
    rotate(x, cache);
#pragma unroll
    for (int e = 0; e < E; e++) x[e] = rounded_to(cache.layout.recent_type, x[e]);
  }
  // A token as its tile takes it.
  SKV_DEVICE void content(int position, float (&x)[E]) const {
    if (position < sequence.past) {
      load_row(cache, block, position, x);
    } else {
      stored(position, x);
    }
    if (cache.basis.key) to_tile(x, cache, head);
  }
};

// Shared memory: four tokens' codes, the parameters of channels, and each warp's range of each channel (or, in `low`,
// its sum).
template <int E>
struct Shared {
  uint8_t codes[4][32 * E];
  uint8_t parameters[4 * 32 * E];
  float low[kWarps][32 * E], high[kWarps][32 * E];
};

// Packs four tokens' codes into the planes of a tile; all threads.
template <int E>
SKV_DEVICE void pack(const Cache& c, const uint8_t (&codes)[4][32 * E], uint8_t* tile, int quad) {
  const int tokens = c.layout.tile_tokens;
  for (int left = c.layout.bits, width = 8; left > 0; width /= 2) {
    if (left < width) continue;
    left -= width;
    const uint32_t mask = (1u << width) - 1;
    const int row_bytes = c.dim * width / 8, per_byte = 8 / width;
    for (int i = threadIdx.x; i < row_bytes; i += kThreads) {
      uint32_t word = 0;
      if (c.layout.is_value) {  // byte i of four tokens
        for (int t = 0; t < 4; t++) {
          for (int f = 0; f < per_byte; f++) {
            word |= (codes[t][i * per_byte + f] >> left & mask) << (8 * t + f * width);
          }
        }
        reinterpret_cast<uint32_t*>(tile)[quad * row_bytes + i] = word;
      } else {  // word i / 4 of token i % 4
        for (int f = 0; f < 4 * per_byte; f++) {
          word |= (codes[i % 4][i / 4 * 4 * per_byte + f] >> left & mask) << (f * width);
        }
        reinterpret_cast<uint32_t*>(tile)[i / 4 * tokens + 4 * quad + i % 4] = word;
      }
    }
    tile += tokens * row_bytes;
  }
}

// Codes of one token per warp to shared memory, for four tokens at a time: those that are this block's.
template <int E, class CodesOf>
SKV_DEVICE void encode_codes(const Target<E>& target, Shared<E>& shared, uint8_t* tile, int first, CodesOf codes_of) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int quad = target.part; quad < target.cache.layout.tile_tokens / 4; quad += target.parts) {
    float x[E], codes[E] = {};
    target.content(first + 4 * quad + warp, x);
    codes_of(x, 4 * quad + warp, codes);
#pragma unroll
    for (int e = 0; e < E; e++) shared.codes[warp][lane + 32 * e] = uint8_t(codes[e]);
    __syncthreads();
    pack<E>(target.cache, shared.codes, tile, quad);
    __syncthreads();
  }
}

// A channel's scale and offset from its range over the tile. Whole warps: 32 channels have common units.
SKV_DEVICE void store_channel(const Cache& c, uint8_t* parameters, int d, float low, float high, float levels) {
  if (c.layout.parameter_bits == 16) {
    store(parameters, d, SKV_FLOAT16, saturated(__fdiv_rn(__fsub_rn(high, low), levels)));
    store(parameters, c.dim + d, SKV_FLOAT16, saturated(low));
    return;
  }
  const InBytes<int8_t> offset(low);
  const InBytes<uint8_t> scale(__fdiv_rn(fmaxf(__fsub_rn(high, offset.value()), 0.f), levels));
  parameters[d] = scale.byte();
  parameters[c.dim + d] = offset.byte();
  uint16_t* units = reinterpret_cast<uint16_t*>(parameters + 2 * c.dim);
  const int groups = c.dim / 32;
  if (d % 32 == 0) {
    units[d / 32] = scale.unit;
    units[groups + d / 32] = offset.unit;
  }
  if (d < (c.parameter_bytes - 2 * c.dim) / 2 - 2 * groups) units[2 * groups + d] = 0;
}

// Codes of calibrated keys, channels from the last to the first; each is lowered by its share of what those after it
// were rounded up: reference._quantize_calibrated.
template <int E>
SKV_DEVICE void encode_with_feedback(const Target<E>& target, Shared<E>& shared, uint8_t* tile, int first,
                                     float levels) {
  const Cache& c = target.cache;
  const int lane = threadIdx.x % 32;
  const float* feedback = of_head(c.basis.feedback, c, target.head);
  float scale[E], offset[E];
#pragma unroll
  for (int e = 0; e < E; e++) {
    const ChannelParameters channel(c, shared.parameters, lane + 32 * e);
    scale[e] = channel.scale;
    offset[e] = channel.offset;
  }
  encode_codes<E>(target, shared, tile, first, [&](const float (&x)[E], int, float (&codes)[E]) {
    float shift[E] = {};
#pragma unroll
    for (int e = E - 1; e >= 0; e--) {
      for (int l = 31; l >= 0; l--) {  // channel l + 32 e is lane l's
        const float quotient = divide(__fsub_rn(__fsub_rn(x[e], shift[e]), offset[e]), scale[e]);
        const float code = rintf(clamp(quotient, 0.f, levels));
        if (lane == l) codes[e] = code;
        const float own = __fsub_rn(__fadd_rn(__fmul_rn(code, scale[e]), offset[e]), x[e]);
        const float error = __shfl_sync(kWarp, own, l);
        const float* shares = feedback + (l + 32 * e) * c.dim + lane;
#pragma unroll
        for (int i = 0; i <= e; i++) {
          if (i < e || lane < l) shift[i] = __fadd_rn(shift[i], __fmul_rn(shares[32 * i], error));
        }
      }
    }
  });
}

template <int E>
SKV_DEVICE void encode_per_channel(const Target<E>& target, Shared<E>& shared, uint8_t* tile, int first) {
  const Cache& c = target.cache;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float low[E], high[E];
#pragma unroll
  for (int e = 0; e < E; e++) {
    low[e] = INFINITY;
    high[e] = -INFINITY;
  }
  for (int t = warp; t < c.layout.tile_tokens; t += kWarps) {
    float x[E];
    target.content(first + t, x);
#pragma unroll
    for (int e = 0; e < E; e++) {
      low[e] = fminf(low[e], x[e]);
      high[e] = fmaxf(high[e], x[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < E; e++) {
    shared.low[warp][lane + 32 * e] = low[e];
    shared.high[warp][lane + 32 * e] = high[e];
  }
  __syncthreads();
  const float levels = float((1 << c.layout.bits) - 1);
  for (int d = threadIdx.x; d < c.dim; d += kThreads) {
    float lowest = shared.low[0][d], highest = shared.high[0][d];
    for (int w = 1; w < kWarps; w++) {
      lowest = fminf(lowest, shared.low[w][d]);
      highest = fmaxf(highest, shared.high[w][d]);
    }
    lowest = __fadd_rn(lowest, 0.f);  // of -0 and 0 both are 0
    highest = __fadd_rn(highest, 0.f);
    if (c.layout.bits <= 2) {  // the levels are the middles of equal cells (reference.CHANNEL_MARGIN)
      const float margin = __fmul_rn(__fsub_rn(highest, lowest), c.layout.bits == 1 ? 0.25f : 0.125f);
      lowest = __fadd_rn(lowest, margin);
      highest = __fsub_rn(highest, margin);
    }
    store_channel(c, shared.parameters, d, lowest, highest, levels);
  }
  __syncthreads();
  for (int i = threadIdx.x; target.part == 0 && i < c.parameter_bytes / 4; i += kThreads) {
    reinterpret_cast<uint32_t*>(tile + c.code_bytes)[i] = reinterpret_cast<const uint32_t*>(shared.parameters)[i];
  }
  if (c.basis.feedback) return encode_with_feedback(target, shared, tile, first, levels);
  encode_codes<E>(target, shared, tile, first, [&](const float (&x)[E], int, float (&codes)[E]) {
#pragma unroll
    for (int e = 0; e < E; e++) {
      const ChannelParameters channel(c, shared.parameters, lane + 32 * e);
      codes[e] = clamp(rintf(divide(__fsub_rn(x[e], channel.offset), channel.scale)), 0.f, levels);
    }
  });
}

// Each channel's sum over the tile's tokens as a halving tree, x[:n/2] + x[n/2:] repeated. All threads.
//
// Warp w has the branch of tokens w, w + 4, ... It takes them in the order of reversed bits, so that what is to be
// added is always the newest of what is kept: the partial sums of 1, 2, 4, ... tokens.
template <int E>
SKV_DEVICE void sum_over_tokens(const Target<E>& target, Shared<E>& shared, int first, float (&sum)[E]) {
  constexpr int kLevels = 5;  // 128 tokens: 32 in each warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = target.cache.layout.tile_tokens / kWarps;
  float kept[kLevels][E];
  for (int i = 0; i < count; i++) {
    int reversed = 0;
    for (int bit = 1; bit < count; bit *= 2) reversed = 2 * reversed + ((i & bit) != 0);
    target.content(first + kWarps * reversed + warp, sum);
    bool carried = true;
#pragma unroll
    for (int level = 0; level < kLevels; level++) {
      const bool adds = carried && i >> level & 1, keeps = carried && !adds;
#pragma unroll
      for (int e = 0; e < E; e++) {
        if (adds) sum[e] = __fadd_rn(kept[level][e], sum[e]);
        if (keeps) kept[level][e] = sum[e];
      }
      carried = adds;
    }
  }
#pragma unroll
  for (int e = 0; e < E; e++) shared.low[warp][lane + 32 * e] = sum[e];
  __syncthreads();
#pragma unroll
  for (int e = 0; e < E; e++) {
    const int d = lane + 32 * e;
    sum[e] = __fadd_rn(__fadd_rn(shared.low[0][d], shared.low[2][d]), __fadd_rn(shared.low[1][d], shared.low[3][d]));
  }
}

// The tile's means, stored in 8 bits, as they are stored: reference._means.
template <int E>
SKV_DEVICE void encode_means(const Target<E>& target, Shared<E>& shared, uint8_t* tile, int first, float (&means)[E]) {
  const Cache& c = target.cache;
  const int lane = threadIdx.x % 32;
  sum_over_tokens(target, shared, first, means);
  float largest = 0;
#pragma unroll
  for (int e = 0; e < E; e++) {
    means[e] = __fdiv_rn(means[e], float(c.layout.tile_tokens));
    largest = fmaxf(largest, fabsf(means[e]));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, lanes));
  const MeanGrid grid(largest);
  uint8_t* to = tile + c.means;
  const bool writes = target.part == 0 && threadIdx.x < 32;
#pragma unroll
  for (int e = 0; e < E; e++) {
    const float code = grid.code(means[e]);
    if (writes) to[lane + 32 * e] = uint8_t(int8_t(code));
    means[e] = __fmul_rn(code, __half2float(grid.unit));
  }
  if (writes && lane < 8) reinterpret_cast<half*>(to + c.dim)[lane] = lane == 0 ? grid.unit : __float2half_rn(0.f);
}

template <int E>
SKV_DEVICE void encode_per_token(const Target<E>& target, Shared<E>& shared, uint8_t* tile, int first) {
  const Cache& c = target.cache;
  half* scales = reinterpret_cast<half*>(tile + c.code_bytes);
  float means[E] = {};
  if (c.means) encode_means(target, shared, tile, first, means);
  encode_codes<E>(target, shared, tile, first, [&](float (&x)[E], int t, float (&codes)[E]) {
#pragma unroll
    for (int e = 0; e < E; e++) x[e] = __fsub_rn(x[e], means[e]);
    const int per_group = c.layout.group_size / 32;
    for (int group = 0; group < c.groups; group++) {
      const half scale = quantize_group(x, group * per_group, per_group, c.layout.bits, codes);
      if (threadIdx.x % 32 == 0) scales[group * c.layout.tile_tokens + t] = scale;
    }
  });
}

template <int E>
SKV_DEVICE void write_row(const Cache& c, uint8_t* row, const float (&x)[E]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < E; e++) store(row, lane + 32 * e, c.layout.recent_type, x[e]);
}

template <int E>
SKV_DEVICE void encode(const Target<E>& target, Shared<E>& shared, uint8_t* tile, int first) {
  const Cache& c = target.cache;
  if (c.layout.bits != 16) {
    if (c.layout.granularity == SKV_CHANNEL) return encode_per_channel(target, shared, tile, first);
    return encode_per_token(target, shared, tile, first);
  }
  for (int t = kWarps * target.part + threadIdx.x / 32; t < c.layout.tile_tokens; t += kWarps * target.parts) {
    float x[E];
    target.content(first + t, x);
    write_row(c, tile + int64_t{t} * c.dim * type_bytes(c.layout.recent_type), x);
  }
}

// Grid: columns that are merged, then the parts of the tiles that the call may fill (or a share of its rows), for keys
// and for values; sequence and head.
template <int E>
__global__ void __launch_bounds__(kThreads, 1) append_kernel(Append a) {
  SKV_DYNAMIC_SHARED(memory);
  if (int(blockIdx.x) < a.combined) {
    combine_column<E>(a.call, blockIdx.x, reinterpret_cast<float*>(memory));
    return;
  }
  const Attention& call = a.call;
  const int b = blockIdx.y / call.kv_num_heads, warp = threadIdx.x / 32;
  const Sequence s = sequence(call.lengths, b, call.key, call.value);
  if (!s.valid || s.fresh == 0) return;
  const bool is_value = int(blockIdx.x) >= a.combined + a.blocks;
  const int index = int(blockIdx.x) - a.combined - (is_value ? a.blocks : 0);
  const Cache& c = is_value ? call.value : call.key;
  const SkvLayout& l = c.layout;
  uint8_t* block = block_of(c, blockIdx.y);
  const int of_call = index / a.parts, head = blockIdx.y % call.kv_num_heads;
  const Target<E> target{c,
                         is_value ? call.new_value : call.new_key,
                         s,
                         block,
                         b,
                         head,
                         call.lengths.tokens,
                         index - of_call * a.parts,
                         a.parts,
                         a.not_finite};
  if (a.tiles) {
    const int last = quantized(l, s.total) / l.tile_tokens, tile = quantized(l, s.past) / l.tile_tokens + of_call;
    if (tile < last && tile >= last - c.tiles) {
      encode(target, *reinterpret_cast<Shared<E>*>(memory), block + tile_start(c, tile),
             l.num_sink_tokens + tile * l.tile_tokens);
    }
  }
  if (!a.rows) return;
  for (int position = s.past + index * kWarps + warp; position < s.total; position += a.blocks * kWarps) {
    if (position >= l.num_sink_tokens && position < s.total - c.ring) continue;
    float x[E];
    target.stored(position, x);
    write_row(c, block + row_start(c, position), x);
  }
}

}  // namespace

cudaError_t append(const Attention& call, int32_t* not_finite, bool combines, void* stream) {
  const int tile_tokens = call.key.layout.tile_tokens, tokens = call.lengths.tokens;
  const int tiles = (tokens + tile_tokens - 1) / tile_tokens;
  // A decoding step fills a tile once in tile_tokens steps, in all layers at once: many blocks share it then, eight
  // tokens each. A prompt's tiles are many.
  const int parts = tiles == 1 ? tile_tokens / 8 : 1;
  // Rows are overwritten when all blocks have read them. One new token's is none of those that its tile is made from:
  // it takes the row of the token a whole ring before it, which has left for the tile before.
  Append a{call, not_finite, combines ? call.columns : 0, tiles * parts, parts, true, tokens == 1};
  return with_channels(call.key, [&](auto channels) {
    constexpr int E = decltype(channels)::value;
    const auto run = [&](size_t shared_bytes) {
      const dim3 grid(a.combined + 2 * a.blocks, call.batch * call.kv_num_heads);
      return launch(append_kernel<E>, grid, kThreads, shared_bytes, stream, a);
    };
    const size_t merged = combines ? combine_bytes(call.splits, E) : 0;
    const cudaError_t error = run(merged > sizeof(Shared<E>) ? merged : sizeof(Shared<E>));
    if (error != cudaSuccess || a.rows) return error;
    a.combined = 0;
    a.blocks = tiles;
    a.tiles = false;
    a.rows = true;
    return run(sizeof(Shared<E>));
  });
}

}  // namespace skv::cuda
