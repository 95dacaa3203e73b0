// Attention on tensor cores directly from the codes, for few query tokens.
//
// S^T = K Q^T and O^T = V^T P^T: 8 columns of queries (heads of a group, then tokens) stand on the N side of m16n8k16,
// tokens or channels on the M side. A warp takes whole tiles in slabs of 32 tokens, which it copies to shared memory
// ahead of their use; the sinks, the recent tokens and the new ones are pieces of 32 exact rows behind the tiles. Lane
// l is (r, c) = (l / 4, l % 4): it holds keys of tokens 2r, 2r + 1 of 16 (16 channels per chunk of 64), values of
// tokens 4c ... 4c + 3 (8 channels per chunk), scores of columns 2c, 2c + 1.
//
// Keys per channel: the scales are folded into the query once per tile, offsets and the 1024s of the raw codes into the
// scores' initial value. Keys per token: scores of each group of channels times the scale. Values per token: the scale
// times the weight. Values per channel: scale and offset into the operand. Means per channel (token_channel): the
// query's product with the keys' means once per tile, and the values' means times the sum of a slab's weights.
#pragma once
#include "mma_warp.cuh"

namespace skv::cuda {

// A warp's slabs in order: tiles `tile`, `tile + kWarpCount`, ..., each cut into slabs of 32 tokens, copied ahead of
// their use. Positions and addresses are counted on, not computed: a division costs more than a slab's scores. What a
// lane copies beside codes is found from where its codes are, as registers are short.
template <class S>
struct Slabs {
  using K = typename S::K;
  using V = typename S::V;
  using KPlane = KeyPlane<S::D, K::kWidth>;
  using VPlane = ValuePlane<S::D, V::kWidth>;

  const Attention& a;
  const uint8_t *keys, *values;  // this lane's first piece of the next slab's codes
  uint8_t* stages;
  int tile, count;  // of the next slab to copy; slabs left to copy
  int first_token = 0, stage = 0;
  int key_scales, value_scales;  // from a lane's codes to its scales, in a tile's first slab

  SKV_DEVICE Slabs(const Attention& a, int64_t sequence_and_head, uint8_t* stages, int tile, int count)
      : a(a), stages(stages), tile(tile), count(count) {
    const int tokens = a.key.layout.tile_tokens, lane = threadIdx.x % 32;
    const int scales = lane / 4 * tokens * 2 + lane % 4 * 16;
    keys = block_of(a.key, sequence_and_head) + start(a.key) + KPlane::lane_offset(tokens);
    values = block_of(a.value, sequence_and_head) + start(a.value) + VPlane::lane_offset();
    key_scales = int(a.key.code_bytes) + scales - KPlane::lane_offset(tokens);
    value_scales = int(a.value.code_bytes) + scales - VPlane::lane_offset();
  }

  // Starts copying the next slab; closes a group of copies in any case, so that groups can be counted.
  SKV_DEVICE void copy() {
    if (count > 0) {
      uint8_t* to = stages + stage * S::kStage;
      copy_keys(to);
      copy_values(to);
      count--;
      stage = stage + 1 < S::kStages ? stage + 1 : 0;
      advance();
    }
    async_commit();
  }

 private:
  static constexpr int kKeyStep = 4, kValueStep = S::D * V::kWidth / 8;  // from token to token

  // Without a window every tile has a slot of its own.
  SKV_DEVICE int64_t start(const Cache& c) const { return a.window > 0 ? tile_start(c, tile) : tile * c.tile_bytes; }
  SKV_DEVICE int64_t to_next(const Cache& c) const {
    if (a.window == 0) return S::kWarpCount * c.tile_bytes;
    return tile_start(c, tile + S::kWarpCount) - tile_start(c, tile);
  }
  SKV_DEVICE void advance() {
    first_token += kSlab;
    keys += kSlab * kKeyStep;
    values += kSlab * kValueStep;
    const int tokens = a.key.layout.tile_tokens;
    if (first_token < tokens) return;
    first_token = 0;
    keys += to_next(a.key) - tokens * kKeyStep;
    values += to_next(a.value) - tokens * kValueStep;
    tile += S::kWarpCount;
  }

  // From a lane's codes of this slab to its scales: two bytes per token, where the codes have `step`.
  SKV_DEVICE int scales_after(int of_first_slab, int step) const { return of_first_slab + first_token * (2 - step); }

  SKV_DEVICE void copy_keys(uint8_t* to) const {
    const int tokens = a.key.layout.tile_tokens, lane = threadIdx.x % 32;
    KPlane::copy(to + KPlane::lane_place(), keys, tokens);
    if constexpr (K::kTwoPlanes) {  // lanes stand alike in both planes
      KeyPlane<S::D, 1>::copy(to + KPlane::kBytes + KPlane::lane_place(), keys + tokens * (S::D * K::kWidth / 8),
                              tokens);
    }
    uint8_t* parameters = to + S::kKeyParameters;
    if constexpr (S::KPerToken) {
      if (lane < 4 * a.key.groups) async_copy16(parameters + 16 * lane, keys + scales_after(key_scales, kKeyStep));
    }
    if (first_token != 0) return;
    const int piece = 16 * lane - KPlane::lane_offset(tokens);  // from this lane's first codes of the tile
    if constexpr (S::KPerToken) {
      if (a.key.means) copy_pieces<S::kMeans>(parameters + S::kScales, keys + (piece + a.key.means));
    } else {
      copy_pieces<4 * S::D>(parameters, keys + (piece + int(a.key.code_bytes)), a.key.parameter_bytes);
    }
  }
  SKV_DEVICE void copy_values(uint8_t* to) const {
    const int tokens = a.value.layout.tile_tokens, lane = threadIdx.x % 32;
    VPlane::copy(to + S::kValueCodes + VPlane::lane_place(), values);
    if constexpr (V::kTwoPlanes) {
      using Second = ValuePlane<S::D, 1>;
      const int second = tokens * kValueStep + first_token * (S::D / 8 - kValueStep);
      Second::copy(to + S::kValueCodes + VPlane::kBytes + Second::lane_place(),
                   values + (second + Second::lane_offset() - VPlane::lane_offset()));
    }
    uint8_t* parameters = to + S::kValueParameters;
    const int piece = 16 * lane - VPlane::lane_offset() - first_token * kValueStep;
    if constexpr (S::VPerChannel) {
      copy_pieces<4 * S::D>(parameters, values + (piece + int(a.value.code_bytes)), a.value.parameter_bytes);
    } else {
      if (lane < 4 * a.value.groups) {
        async_copy16(parameters + 16 * lane, values + scales_after(value_scales, kValueStep));
      }
      if (a.value.means) copy_pieces<S::kMeans>(parameters + S::kScales, values + (piece + a.value.means));
    }
  }
  // So many bytes, Most at most, of which `from` is this lane's first piece of 16.
  template <int Most>
  static SKV_DEVICE void copy_pieces(uint8_t* to, const uint8_t* from, int bytes = Most) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < Most / 16; i += 32) {
      if (lane + i < bytes / 16) async_copy16(to + 16 * (lane + i), from + 16 * i);
    }
  }
};

// Queries to shared memory: rotated, channels in the order of the key's codes.
template <class S>
SKV_DEVICE void prepare_queries(const Attention& a, const Tokens& queries, int b, int head, half* to) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < S::kColumns; i += S::kWarpCount) {
    const int column = blockIdx.z * S::kColumns + i;
    float x[S::E] = {};
    if (column < a.columns) {
      load_token(queries, int64_t{b} * a.lengths.tokens + column / a.group(), head * a.group() + column % a.group(), x);
      rotate(x, a.key);
    }
#pragma unroll
    for (int e = 0; e < S::E; e++) {
      const int d = lane + 32 * e;
      to[i * S::kQueryStride + d / 16 * 16 + S::Order::place(d % 16)] = __float2half_rn(saturated(x[e]));
    }
  }
}

// New keys and values to shared memory as rows of the cache's basis; values that are not numbers as 0, which the merge
// of the splits makes up for.
template <class S>
SKV_DEVICE void prepare_new_rows(const Attention& a, const Sequence& s, int b, int head, half* to) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < 2 * s.fresh; i += S::kWarpCount) {
    const bool is_value = i >= s.fresh;
    const int token = is_value ? i - s.fresh : i;
    float x[S::E];
    load_token(is_value ? a.new_value : a.new_key, int64_t{b} * a.lengths.tokens + token, head, x);
    rotate(x, is_value ? a.value : a.key);
#pragma unroll
    for (int e = 0; e < S::E; e++) {
      const float kept = is_value && is_nan(x[e]) ? 0.f : saturated(x[e]);
      to[(token + (is_value ? S::kMaxNew : 0)) * S::D + lane + 32 * e] = __float2half_rn(kept);
    }
  }
}

// Asks for the exact rows of a piece, which a warp reads after its tiles: each lane for one.
template <class S>
SKV_DEVICE void prefetch_rows(const Attention& a, const Work& work, int piece) {
  const int index = (piece - work.tile_pieces) * kSlab + threadIdx.x % 32;
  const int position = work.position(a.key.layout, index);
  if (piece >= work.end || index >= work.exact || position >= work.s.past) return;
  const int64_t row = int64_t{row_of(a.key, position)} * S::D * 2;
  const uint8_t* key = block_of(a.key, blockIdx.y) + a.key.rows_start + row;
  const uint8_t* value = block_of(a.value, blockIdx.y) + a.value.rows_start + row;
#pragma unroll
  for (int i = 0; i < 2 * S::D; i += 128) {
    prefetch(key + i);
    prefetch(value + i);
  }
}

// The warps' results to the split's. All threads; `merged` takes the place of the slabs.
template <class S>
SKV_DEVICE void merge(const Attention& a, Warp<S>& warp, float* merged) {
  constexpr int kRow = S::D + 2;  // the output, the peak, the sum
  const int w = threadIdx.x / 32;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < S::Blocks; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float* row = merged + (w * S::kColumns + 8 * n + 2 * warp.c + e) * kRow;
#pragma unroll
      for (int i = 0; i < 4 * S::kChunks; i++) {
        const int d = i / 4 * 64 + 8 * warp.r + i % 4 * 2;
        row[d] = warp.o[n][i][e];
        row[d + 1] = warp.o[n][i][2 + e];
      }
      float sum = warp.sum[n][e];
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kWarp, sum, lanes);
      if (warp.r == 0) {
        row[S::D] = warp.peak[n][e];
        row[S::D + 1] = sum;
      }
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int i = w; i < S::kColumns && warp.first_column + i < a.columns; i += S::kWarpCount) {
    const float* rows = merged + i * kRow;
    float highest = -INFINITY, total = 0, share[S::kWarpCount];
    for (int v = 0; v < S::kWarpCount; v++) highest = fmaxf(highest, rows[v * S::kColumns * kRow + S::D]);
    for (int v = 0; v < S::kWarpCount; v++) {
      const float* row = rows + v * S::kColumns * kRow;
      share[v] = row[S::D] == -INFINITY ? 0.f : fast_exp2((row[S::D] - highest) * warp.unit);
      total += share[v] * row[S::D + 1];
    }
    const int64_t at = (int64_t{blockIdx.y} * a.splits + blockIdx.x) * a.columns + warp.first_column + i;
#pragma unroll
    for (int d = lane; d < S::D; d += 32) {
      float out = 0;
      for (int v = 0; v < S::kWarpCount; v++) out += share[v] * rows[v * S::kColumns * kRow + d];
      a.partial[at * S::D + d] = out;
    }
    if (lane == 0) a.peaks[at] = make_float2(highest * warp.unit * kLn2, total);
  }
}

// Grid: splits, sequence and head, groups of kColumns columns.
template <class S>
__global__ void __launch_bounds__(S::kThreadCount, S::kMinBlocks) decode_mma_kernel(Attention a) {
  SKV_DYNAMIC_SHARED(shared);
  const int b = blockIdx.y / a.kv_num_heads, head = blockIdx.y % a.kv_num_heads;
  const int w = __shfl_sync(kWarp, int(threadIdx.x / 32), 0);  // the same for the warp, as the compiler then knows
  const Work work(a, b, S::kWarpCount);
  if (work.begin >= work.end) {  // nothing: sums of zero, which the merge of the splits passes over
    for (int i = threadIdx.x; i < S::kColumns; i += S::kThreadCount) {
      const int column = blockIdx.z * S::kColumns + i;
      const int64_t at = (int64_t{blockIdx.y} * a.splits + blockIdx.x) * a.columns + column;
      if (column < a.columns) a.peaks[at] = make_float2(-INFINITY, 0);
    }
    return;
  }
  const int tiles_end = work.end < work.tile_pieces ? work.end : work.tile_pieces, from = work.begin + w;
  const int tiles = from < tiles_end ? (tiles_end - from + S::kWarpCount - 1) / S::kWarpCount : 0;
  uint8_t* stages = shared + S::kSlabs + w * S::kStages * S::kStage;
  const int per_tile = a.key.layout.tile_tokens / kSlab;
  Slabs<S> slabs(a, blockIdx.y, stages, work.first_tile + from, tiles * per_tile);
  for (int i = 0; i < S::kStages - 1; i++) slabs.copy();
  prefetch_rows<S>(a, work, from + tiles * S::kWarpCount);
  half* queries = reinterpret_cast<half*>(shared);
  prepare_queries<S>(a, a.tile_query.data ? a.tile_query : a.query, b, head, queries);
  if (work.end > work.tile_pieces) {
    prepare_new_rows<S>(a, work.s, b, head, reinterpret_cast<half*>(shared + S::kNewRows));
  }
  __syncthreads();

  Warp<S> warp(a, work, shared);
  int stage = 0, position = a.key.layout.num_sink_tokens + (work.first_tile + from) * a.key.layout.tile_tokens;
  for (int i = 0; i < tiles; i++) {
    for (int j = 0; j < per_tile; j++) {
      async_wait<S::kStages - 2>();
      __syncwarp();  // the slab is there for all lanes, and all are done with the one before it
      slabs.copy();
      warp.slab(stages + stage * S::kStage, j == 0, position);
      stage = stage + 1 < S::kStages ? stage + 1 : 0;
      position += kSlab;
    }
    position += (S::kWarpCount - 1) * a.key.layout.tile_tokens;
  }
  if (a.tile_query.data && work.end > work.tile_pieces) {  // the exact rows are in the model's basis
    __syncthreads();
    prepare_queries<S>(a, a.query, b, head, queries);
    __syncthreads();
  }
  for (int piece = from + tiles * S::kWarpCount; piece < work.end; piece += S::kWarpCount) {
    warp.exact_piece(block_of(a.key, blockIdx.y), block_of(a.value, blockIdx.y), (piece - work.tile_pieces) * kSlab);
  }
  merge<S>(a, warp, reinterpret_cast<float*>(shared + S::kSlabs));
}

}  // namespace skv::cuda
