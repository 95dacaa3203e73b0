// Attention on CUDA cores, one warp per token, for every layout and type: the reference of the fast kernels, and the
// fallback for layouts that they do not cover. Also the launch of the merge of the splits, where no append goes with
// it.
#include "launchers.h"

#include "combine.cuh"

namespace skv::cuda {
namespace {

constexpr int kColumns = 4;  // queries that a block attends for: the token is read once for all

// The key or value at a position, in the basis of the cache, or of its tile.
template <int E>
SKV_DEVICE bool load_any(const Attention& a, bool is_value, const Sequence& s, int64_t b, int head, int position,
                         float (&x)[E]) {
  const Cache& c = is_value ? a.value : a.key;
  if (position < s.past) return load_position(c, block_of(c, b * a.kv_num_heads + head), s.past, position, x);
  load_token(is_value ? a.new_value : a.new_key, b * a.lengths.tokens + position - s.past, head, x);
  rotate(x, c);
  return true;
}

template <int E>
struct Shared {
  float output[kWarps][kColumns][32 * E];
  float peak[kWarps][kColumns], sum[kWarps][kColumns];
};

// Grid: splits, sequence and head, groups of kColumns columns.
template <int E>
__global__ void __launch_bounds__(kThreads, 1) decode_simple_kernel(Attention a) {
  SKV_DYNAMIC_SHARED(memory);
  Shared<E>& shared = *reinterpret_cast<Shared<E>*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int b = blockIdx.y / a.kv_num_heads, head = blockIdx.y % a.kv_num_heads, first = blockIdx.z * kColumns;
  const Sequence s = sequence(a.lengths, b, a.key, a.value);
  float q[kColumns][E], o[kColumns][E], peak[kColumns], sum[kColumns];
  const auto load_queries = [&](const Tokens& queries) {
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      const int column = first + i < a.columns ? first + i : a.columns - 1;
      load_token(queries, int64_t{b} * a.lengths.tokens + column / a.group(), head * a.group() + column % a.group(),
                 q[i]);
      rotate(q[i], a.key);
#pragma unroll
      for (int e = 0; e < E; e++) q[i][e] *= a.scale;
    }
  };
  load_queries(a.query);
  bool in_tiles = false;  // whether q is in the basis of the tiles
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
#pragma unroll
    for (int e = 0; e < E; e++) o[i][e] = 0;
    peak[i] = -INFINITY;
    sum[i] = 0;
  }
  const int low = a.window > 0 && s.past + 1 > a.window ? s.past + 1 - a.window : 0;
  const int share = s.valid ? (s.total - low + a.splits - 1) / a.splits : 0;
  const int start = low + blockIdx.x * share, end = start + share < s.total ? start + share : s.total;
  for (int position = start + warp; s.valid && position < end; position += kWarps) {
    float k[E], v[E];
    if (!load_any(a, false, s, b, head, position, k)) continue;
    load_any(a, true, s, b, head, position, v);
    if (a.tile_query.data && in_tiles != (position < s.past && is_in_tile(a.key, s.past, position))) {
      in_tiles = !in_tiles;
      load_queries(in_tiles ? a.tile_query : a.query);
    }
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      const int at = s.past + (first + i) / a.group();  // the query's own position
      if (position > at || (a.window > 0 && position <= at - a.window)) continue;
      float score = 0;
#pragma unroll
      for (int e = 0; e < E; e++) score += q[i][e] * k[e];
      for (int lanes = 16; lanes > 0; lanes /= 2) score += __shfl_xor_sync(kWarp, score, lanes);
      if (a.softcap > 0) score = a.softcap * tanhf(score / a.softcap);
      const float higher = fmaxf(peak[i], score), shrink = expf(peak[i] - higher), weight = expf(score - higher);
      peak[i] = higher;
      sum[i] = sum[i] * shrink + weight;
#pragma unroll
      for (int e = 0; e < E; e++) o[i][e] = o[i][e] * shrink + weight * v[e];
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
#pragma unroll
    for (int e = 0; e < E; e++) shared.output[warp][i][lane + 32 * e] = o[i][e];
    if (lane == 0) {
      shared.peak[warp][i] = peak[i];
      shared.sum[warp][i] = sum[i];
    }
  }
  __syncthreads();
  for (int i = 0; i < kColumns && first + i < a.columns; i++) {
    float highest = -INFINITY, total = 0;
    for (int w = 0; w < kWarps; w++) highest = fmaxf(highest, shared.peak[w][i]);
    const int64_t row = (int64_t{blockIdx.y} * a.splits + blockIdx.x) * a.columns + first + i;
    for (int d = threadIdx.x; d < 32 * E; d += kThreads) {
      float out = 0;
      for (int w = 0; w < kWarps; w++) {
        if (shared.sum[w][i] != 0) out += expf(shared.peak[w][i] - highest) * shared.output[w][i][d];
      }
      a.partial[row * 32 * E + d] = out;
    }
    for (int w = 0; w < kWarps; w++) {
      if (shared.sum[w][i] != 0) total += expf(shared.peak[w][i] - highest) * shared.sum[w][i];
    }
    if (threadIdx.x == 0) a.peaks[row] = make_float2(highest, total);
  }
}

// Grid: columns, sequence and head.
template <int E>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(Attention a) {
  SKV_DYNAMIC_SHARED(shared);
  combine_column<E>(a, blockIdx.x, reinterpret_cast<float*>(shared));
}

}  // namespace

cudaError_t decode_simple(const Attention& a, void* stream) {
  const dim3 grid(a.splits, a.batch * a.kv_num_heads, (a.columns + kColumns - 1) / kColumns);
  return with_channels(a.key, [&](auto channels) {
    constexpr int E = decltype(channels)::value;
    return launch(decode_simple_kernel<E>, grid, kThreads, sizeof(Shared<E>), stream, a);
  });
}

cudaError_t combine(const Attention& a, void* stream) {
  return with_channels(a.key, [&](auto channels) {
    constexpr int E = decltype(channels)::value;
    return launch(combine_kernel<E>, dim3(a.columns, a.pairs), kThreads, combine_bytes(a.splits, E), stream, a);
  });
}

}  // namespace skv::cuda
