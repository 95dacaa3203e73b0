// Preparation of new tokens on the device: QK norm and RoPE, as in spec/reference.py.
#include "errors.h"
#include "launchers.h"
#include "quantizer.cuh"

namespace skv::cuda {
namespace {

// x / sqrt(mean of squares + epsilon) * weight.
template <int E>
SKV_DEVICE void rms_norm(float (&x)[E], const void* weight, int head_dim, float epsilon, int type) {
  const int lane = threadIdx.x % 32;
  const float sum = tree_sum<E>(0, E, [&](int e) { return __fmul_rn(x[e], x[e]); });
  const float root = __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, float(head_dim)), epsilon));
#pragma unroll
  for (int e = 0; e < E; e++) {
    const int d = lane + 32 * e;
    if (d < head_dim) x[e] = __fmul_rn(__fdiv_rn(x[e], root), load(weight, d, type));
  }
}

// Rotates pairs of channels of `row` (shared memory, one warp's).
SKV_DEVICE void rope(float* row, const SkvCudaPreparation& p, int64_t position) {
  const bool inside = position >= 0 && position < p.rotary_rows;
  for (int i = threadIdx.x % 32; i < p.rotary_half; i += 32) {
    const int64_t at = position * p.rotary_half + i;
    // Beyond the tables there is no answer; NaN shows in the output, and is reported where it would be stored.
    const float cos = inside ? load(p.cos_cache, at, p.type) : NAN, sin = inside ? load(p.sin_cache, at, p.type) : NAN;
    float &a = row[p.rotary_interleaved ? 2 * i : i], &b = row[p.rotary_interleaved ? 2 * i + 1 : i + p.rotary_half];
    const float a0 = a, b0 = b;
    a = __fsub_rn(__fmul_rn(a0, cos), __fmul_rn(b0, sin));
    b = __fadd_rn(__fmul_rn(b0, cos), __fmul_rn(a0, sin));
  }
}

// Grid: tokens of all sequences, groups of kWarps heads (queries, keys, values in a row).
template <int E>
__global__ void __launch_bounds__(kThreads) prepare_kernel(SkvCudaPreparation p, float* out) {
  SKV_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, heads = p.num_heads + 2 * p.kv_num_heads;
  const int64_t token = blockIdx.x;
  const int b = int(token / p.tokens), t = int(token % p.tokens), index = blockIdx.y * kWarps + warp;
  if (index >= heads) return;
  const bool is_query = index < p.num_heads, is_key = !is_query && index < p.num_heads + p.kv_num_heads;
  const int head = is_query ? index : is_key ? index - p.num_heads : index - p.num_heads - p.kv_num_heads;
  const SkvTokens& source = is_query ? p.query : is_key ? p.key : p.value;
  float x[E];
  load_token(Tokens{source.data, source.token_stride, p.type, p.head_dim}, token, head, x);
  const void* weight = is_query ? p.q_norm_weight : is_key ? p.k_norm_weight : nullptr;
  if (weight) rms_norm(x, weight, p.head_dim, p.epsilon, p.type);
  float* row = reinterpret_cast<float*>(shared) + warp * 32 * E;
#pragma unroll
  for (int e = 0; e < E; e++) row[lane + 32 * e] = x[e];
  __syncwarp();
  if (p.cos_cache && (is_query || is_key)) {
    const int64_t total = int64_t{p.seqlens_k[b]} + 1;
    const int64_t fresh = p.query_seqlens ? p.query_seqlens[b] : total < p.tokens ? total : p.tokens;
    const int64_t position = p.position_ids ? p.position_ids[token] : total - fresh + t;
    if (t < fresh) rope(row, p, position);
    __syncwarp();
  }
  float* to = out + (token * heads + index) * p.head_dim;
  for (int d = lane; d < p.head_dim; d += 32) to[d] = row[d];
}

// Grid: tokens of all sequences, groups of kWarps query heads.
template <int E>
__global__ void __launch_bounds__(kThreads) turn_queries_kernel(Attention a, float* out) {
  const int lane = threadIdx.x % 32, head = blockIdx.y * kWarps + threadIdx.x / 32;
  if (head >= a.num_heads) return;
  float x[E];
  load_token(a.query, blockIdx.x, head, x);
  multiply(x, of_head(a.key.basis.query, a.key, head / a.group()), a.key.dim, 1);
  float* to = out + (int64_t{blockIdx.x} * a.num_heads + head) * a.key.dim;
#pragma unroll
  for (int e = 0; e < E; e++) to[lane + 32 * e] = x[e];
}

}  // namespace

int code_for_device() { return can_run(turn_queries_kernel<2>); }

cudaError_t turn_queries(const Attention& a, float* rows, void* stream) {
  const dim3 grid(a.batch * a.lengths.tokens, (a.num_heads + kWarps - 1) / kWarps);
  return with_channels(a.key, [&](auto channels) {
    return launch(turn_queries_kernel<decltype(channels)::value>, grid, kThreads, 0, stream, a, rows);
  });
}

cudaError_t prepare(const SkvCudaPreparation& p, float* rows, void* stream) {
  Cache shape{};
  shape.dim = (p.head_dim + 31) / 32 * 32;
  const dim3 grid(p.batch * p.tokens, (p.num_heads + 2 * p.kv_num_heads + kWarps - 1) / kWarps);
  return with_channels(shape, [&](auto channels) {
    constexpr int E = decltype(channels)::value;
    return launch(prepare_kernel<E>, grid, kThreads, kWarps * 32 * E * sizeof(float), stream, p, rows);
  });
}

}  // namespace skv::cuda
