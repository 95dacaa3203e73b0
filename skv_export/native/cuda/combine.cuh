// The merge of a context's splits: by combine, and by append beside it.
#pragma once
#include "attention.cuh"

namespace skv::cuda {

SKV_HD size_t combine_bytes(int splits, int E) { return kWarps * (splits + 32 * E) * sizeof(float); }

// One column of the sequence and head of blockIdx.y: merges the splits, adds the head sink, rotates back, writes the
// output. All threads of a block, whose warps share the splits: there are few columns where a context is split most.
// shared: combine_bytes.
template <int E>
SKV_DEVICE void combine_column(const Attention& a, int column, float* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pair = a.first_pair + blockIdx.y, b = pair / a.kv_num_heads, kv_head = pair % a.kv_num_heads;
  const int token = column / a.group(), head = kv_head * a.group() + column % a.group();
  const int head_dim = a.value.layout.head_dim;
  // Read at once: the peaks, the lengths and the new values. Only the partial rows wait, for the peaks.
  const int64_t first = int64_t{blockIdx.y} * a.splits * a.columns + column;
  const auto peak_at = [&](int i) {
    return i < a.splits ? a.peaks[first + int64_t{i} * a.columns] : make_float2(0, 0);
  };
  const float2 own = peak_at(lane);
  const auto peak_of = [&](int i) { return i == lane ? own : peak_at(i); };
  const Sequence s = sequence(a.lengths, b, a.key, a.value);
  float out[E], not_a_number[E] = {};
#pragma unroll
  for (int e = 0; e < E; e++) out[e] = s.valid ? 0.f : NAN;
  if (s.valid && token < s.fresh) {
    const float sink = a.head_sink ? load(a.head_sink, head, a.output_type) : -INFINITY;
    if (warp == 0 && a.lengths.tokens <= kMaxDecodeTokens && !a.in_model_basis) {
      for (int t = a.window > 0 && token >= a.window ? token - a.window + 1 : 0; t <= token; t++) {
        float x[E];
        if (!load_not_numbers(a.new_value, int64_t{b} * a.lengths.tokens + t, kv_head, a.value, x)) continue;
#pragma unroll
        for (int e = 0; e < E; e++) not_a_number[e] = is_nan(x[e]) ? x[e] : not_a_number[e];
      }
    }
    float* weights = shared + warp * a.splits;  // the same in each warp: no barrier for them
    float* sums = shared + kWarps * a.splits;
    float highest = sink, total = 0;
    for (int i = lane; i < a.splits; i += 32) highest = fmaxf(highest, peak_of(i).x);
    for (int l = 16; l > 0; l /= 2) highest = fmaxf(highest, __shfl_xor_sync(kWarp, highest, l));
    int used = 0;  // splits up to the last with a token
    for (int i = lane; i < a.splits; i += 32) {
      const float2 peak = peak_of(i);
      weights[i] = peak.y != 0 ? expf(peak.x - highest) : 0.f;  // 0: no tokens, and nothing written
      total += peak.y != 0 ? weights[i] * peak.y : 0.f;
      used = peak.y != 0 ? i + 1 : used;
    }
    for (int l = 16; l > 0; l /= 2) {
      total += __shfl_xor_sync(kWarp, total, l);
      const int others = __shfl_xor_sync(kWarp, used, l);
      used = others > used ? others : used;
    }
    if (a.head_sink) total += expf(sink - highest);
    __syncwarp();
    const float* partial = a.partial + first * 32 * E + lane;
    const int64_t step = int64_t{a.columns} * 32 * E;
#pragma unroll 8
    for (int i = warp; i < used; i += kWarps) {
      const float weight = weights[i];
#pragma unroll
      for (int e = 0; e < E; e++) {
        const float x = partial[i * step + 32 * e];
        out[e] += weight > 0 ? weight * x : 0.f;
      }
    }
#pragma unroll
    for (int e = 0; e < E; e++) sums[(warp * E + e) * 32 + lane] = out[e];
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int e = 0; e < E; e++) {
      for (int w = 1; w < kWarps; w++) out[e] += sums[(w * E + e) * 32 + lane];
      out[e] = is_nan(not_a_number[e]) ? not_a_number[e] : out[e] / total;
    }
    if (!a.in_model_basis) rotate(out, a.value);
  }
  if (warp > 0) return;
  const int64_t row = (int64_t{b} * a.lengths.tokens + token) * a.num_heads + head;
#pragma unroll
  for (int e = 0; e < E; e++) {
    if (lane + 32 * e < head_dim) store(a.output, row * head_dim + lane + 32 * e, a.output_type, out[e]);
  }
}

}  // namespace skv::cuda
