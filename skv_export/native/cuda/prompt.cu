// Around attention over dense rows that is ONNX Runtime's: its inputs are a call's tokens in pieces, with 0 in place of
// what is not a number; afterwards outputs that see such a number become it, and those of padding 0.
#include "launchers.h"

namespace skv::cuda {
namespace {

// One thread per piece and sequence.
__global__ void __launch_bounds__(kThreads, 1) piece_lengths_kernel(Attention a, int piece, int32_t* lengths) {
  const int tokens = a.lengths.tokens, pieces = (tokens + piece - 1) / piece;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= pieces * a.batch) return;
  const int b = i % a.batch, first = i / a.batch * piece, rows = first + piece < tokens ? piece : tokens - first;
  const Sequence s = sequence(a.lengths, b, a.key, a.value);
  const int before = !s.valid ? 0 : first < s.fresh ? first : s.fresh;
  const int until = !s.valid ? -1 : first + rows < s.fresh ? first + rows : s.fresh;
  int32_t* to = lengths + i / a.batch * kPieceLengths * a.batch + b;
  to[0] = s.past + until - 1;
  to[a.batch] = until - before;  // below 0 where the lengths can't be: they can't in any piece
  to[2 * a.batch] = (s.valid ? s.past : 0) + before + rows - 1;
}

// Infinite times a weight of 0 is no more a number than NaN is: in 16 bits both have an end.
SKV_DEVICE float number(float x, int type) {
  if (is_nan(x)) return 0;
  const float most = type == SKV_FLOAT16 ? 65504.f : 3.3895314e38f;
  return fminf(fmaxf(x, -most), most);
}

// Grid: chunks of kChunk tokens, groups of kWarps heads (queries, keys, values in a row) from the first head on,
// sequences.
template <int E>
__global__ void __launch_bounds__(kThreads, 1)
    pack_rows_kernel(Attention a, void* rows, NotNumbers found, int first_head) {
  const int lane = threadIdx.x % 32, index = first_head + blockIdx.y * kWarps + threadIdx.x / 32;
  const int heads = a.num_heads + 2 * a.kv_num_heads, b = blockIdx.z;
  if (index >= heads) return;
  const Sequence s = sequence(a.lengths, b, a.key, a.value);
  const bool is_query = index < a.num_heads, is_key = !is_query && index < a.num_heads + a.kv_num_heads;
  const Tokens& source = is_query ? a.query : is_key ? a.new_key : a.new_value;
  const int head = is_query ? index : is_key ? index - a.num_heads : index - a.num_heads - a.kv_num_heads;
  uint32_t mask = 0;
  for (int t = 0; t < kChunk; t++) {
    const int token = blockIdx.x * kChunk + t;
    if (token >= a.lengths.tokens) break;
    float x[E];
    load_token(source, int64_t{b} * a.lengths.tokens + token, head, x);
    bool any = false;
#pragma unroll
    for (int e = 0; e < E; e++) any |= is_nan(x[e]);
    if (__any_sync(kWarp, any) && s.valid && token < s.fresh) mask |= 1u << t;
    if (!rows) continue;
    const int64_t to = (int64_t{token} * heads + index) * source.head_dim + lane;
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (lane + 32 * e < source.head_dim) store(rows, to + 32 * e, a.output_type, number(x[e], a.output_type));
    }
  }
  if (lane == 0) found.masks[(int64_t{b} * heads + index) * found.chunks + found.first_chunk + blockIdx.x] = mask;
}

// Grid: chunks of kChunk tokens, sequence and head. A warp writes the rows of some of the chunk's tokens, having seen
// all tokens before them that are not numbers: of each channel the last.
template <int E>
__global__ void __launch_bounds__(kThreads, 1)
    spread_not_numbers_kernel(Attention a, NotNumbers found, bool values_only) {
  const int b = blockIdx.y / a.kv_num_heads, head = blockIdx.y % a.kv_num_heads, lane = threadIdx.x % 32;
  const int chunk = blockIdx.x, heads = a.num_heads + 2 * a.kv_num_heads;
  const Sequence s = sequence(a.lengths, b, a.key, a.value);
  if (!s.valid || chunk * kChunk >= s.fresh) return;
  const auto mask = [&](int row, int of_chunk) {
    return found.masks[(int64_t{b} * heads + row) * found.chunks + of_chunk];
  };
  const auto of_query = [&](int i) { return values_only ? 0 : mask(head * a.group() + i, chunk); };
  const auto of_key = [&](int i) { return values_only ? 0 : mask(a.num_heads + head, i); };
  const auto of_value = [&](int i) { return mask(a.num_heads + a.kv_num_heads + head, i); };
  const int seen = a.window > 0 && chunk * kChunk + 1 > a.window ? (chunk * kChunk + 1 - a.window) / kChunk : 0;
  uint32_t any = 0;
  for (int i = seen + lane; i <= chunk; i += 32) any |= of_key(i) | of_value(i);
  for (int i = lane; i < a.group(); i += 32) any |= of_query(i);
  if (!__any_sync(kWarp, any != 0)) return;

  int last[E];  // the token that is not a number in this channel; -1 = none so far
#pragma unroll
  for (int e = 0; e < E; e++) last[e] = -1;
  const auto see = [&](int token) {
    const uint32_t bit = 1u << token % kChunk;
    const bool by_key = of_key(token / kChunk) & bit;
    if (!by_key && !(of_value(token / kChunk) & bit)) return;
    float x[E] = {};
    if (!by_key) load_not_numbers(a.new_value, int64_t{b} * a.lengths.tokens + token, head, a.value, x);
#pragma unroll
    for (int e = 0; e < E; e++) last[e] = by_key || is_nan(x[e]) ? token : last[e];
  };
  for (int i = seen; i < chunk; i++) {
    if ((of_key(i) | of_value(i)) == 0) continue;
    for (int t = 0; t < kChunk; t++) see(i * kChunk + t);
  }
  constexpr int kRows = kChunk / kWarps;
  const int own = threadIdx.x / 32 * kRows, head_dim = a.value.layout.head_dim;
  for (int t = 0; t < own + kRows && chunk * kChunk + t < s.fresh; t++) {
    const int token = chunk * kChunk + t;
    see(token);
    for (int i = 0; t >= own && i < a.group(); i++) {
      const bool whole = of_query(i) >> t & 1;
      const int64_t row = ((int64_t{b} * a.lengths.tokens + token) * a.num_heads + head * a.group() + i) * head_dim;
#pragma unroll
      for (int e = 0; e < E; e++) {
        const bool sees = last[e] >= 0 && (a.window == 0 || last[e] > token - a.window);
        if (lane + 32 * e < head_dim && (whole || sees)) store(a.output, row + lane + 32 * e, a.output_type, NAN);
      }
    }
  }
}

// Grid: tokens, sequences.
__global__ void __launch_bounds__(kThreads, 1) clear_padding_kernel(Attention a) {
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

}  // namespace

cudaError_t piece_lengths(const Attention& a, int32_t piece, int32_t* lengths, void* stream) {
  const int pieces = (a.lengths.tokens + piece - 1) / piece;
  return launch(piece_lengths_kernel, dim3((pieces * a.batch + kThreads - 1) / kThreads), kThreads, 0, stream, a, piece,
                lengths);
}

cudaError_t pack_rows(const Attention& a, void* rows, const NotNumbers& found, void* stream) {
  const int first_head = rows ? 0 : a.num_heads + a.kv_num_heads;  // values alone where nothing is packed
  const int heads = a.num_heads + 2 * a.kv_num_heads - first_head;
  const dim3 grid(chunks_of(a.lengths.tokens), (heads + kWarps - 1) / kWarps, a.batch);
  return with_channels(a.key, [&](auto channels) {
    return launch(pack_rows_kernel<decltype(channels)::value>, grid, kThreads, 0, stream, a, rows, found, first_head);
  });
}

cudaError_t spread_not_numbers(const Attention& a, const NotNumbers& found, bool values_only, void* stream) {
  const dim3 grid(chunks_of(a.lengths.tokens), a.batch * a.kv_num_heads);
  return with_channels(a.key, [&](auto channels) {
    return launch(spread_not_numbers_kernel<decltype(channels)::value>, grid, kThreads, 0, stream, a, found,
                  values_only);
  });
}

cudaError_t clear_padding(const Attention& a, void* stream) {
  const unsigned tokens = a.lengths.tokens < 256 ? a.lengths.tokens : 256;
  return launch(clear_padding_kernel, dim3(tokens, a.batch), kThreads, 0, stream, a);
}

}  // namespace skv::cuda
