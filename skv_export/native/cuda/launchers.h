// Launchers, one function per kernel; arguments have been checked (calls.cu).
#pragma once
#include "device.cuh"

namespace skv::cuda {

constexpr int kMaxDecodeTokens = 8;  // of a sequence, that decode_mma takes
constexpr int kChunk = 32;           // tokens that one word of NotNumbers speaks of
constexpr int kPieceLengths = 3;     // of a sequence, for each piece

// One call's attention as its kernels take it, by value.
struct Attention {
  Cache key, value;
  Tokens query, new_key, new_value;
  Tokens tile_query;  // queries in the basis of the tiles; data = null: tiles have none of their own
  Lengths lengths;
  int32_t batch, num_heads, kv_num_heads;
  int32_t columns;  // rows of queries per KV head: tokens * num_heads / kv_num_heads; column = token * group + head
  int32_t window;   // 0 = none
  float scale, softcap;
  // Per KV head of a sequence, split and column: the unnormalized output [D], and (largest score, sum of weights).
  float* partial;
  float2* peaks;
  int32_t splits;
  // Of all sequences and heads, those that a launch of prefill works on: its blockIdx.y counts from the first.
  int32_t first_pair, pairs;
  bool in_model_basis;  // what stands in partial; else in the cache's
  void* output;
  const void* head_sink;
  int32_t output_type;

  __host__ __device__ int group() const { return num_heads / kv_num_heads; }
};

// QK norm and RoPE: rows [batch * tokens][(num_heads + 2 * kv_num_heads) * head_dim].
cudaError_t prepare(const SkvCudaPreparation& preparation, float* rows, void* stream);

// Queries in the basis of calibrated keys' tiles: rows [batch * tokens][num_heads][D], for tile_query.
cudaError_t turn_queries(const Attention& attention, float* rows, void* stream);

cudaError_t append(const Attention& attention, int32_t* not_finite, void* stream);

cudaError_t decode_simple(const Attention& attention, void* stream);
// An instance of decode_mma, and those of one head_dim.
struct MmaInstance {
  int32_t dim, k_bits, v_bits;
  bool k_per_token, v_per_channel;
  int32_t columns, threads, shared_bytes;
  void (*kernel)(Attention);
};
struct MmaTable {
  const MmaInstance* instances;
  size_t count;
};
MmaTable decode_mma_64();
MmaTable decode_mma_128();
MmaTable decode_mma_256();

// Merges the splits, adds the head sink, rotates back, writes the output.
cudaError_t combine(const Attention& attention, void* stream);

// Rows of all sequences and heads, or of one: positions [0, length) of the cache, in the model's basis.
struct Rows {
  void* data;  // (b, h, position) at ((b * kv_num_heads + h) * head_stride + position) * row_stride
  int64_t head_stride, row_stride;
  int32_t type;
  int32_t channels;  // head_dim, or the padded number
  bool in_fours;     // rows begin at multiples of 8 bytes, and have a multiple of four channels
};
inline Rows make_rows(void* data, int64_t head_stride, int64_t row_stride, int32_t type, int32_t channels) {
  const bool in_fours = row_stride % 4 == 0 && channels % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 8 == 0;
  return {data, head_stride, row_stride, type, channels, in_fours};
}
cudaError_t dequantize(const Cache& cache, const Rows& rows, int64_t sequence, int32_t kv_num_heads, int32_t head,
                       int32_t length, void* stream);
// The past of the launch's sequences and heads, and where `with_new` the new tokens as they are behind it; the rows
// begin with the first of them. New values that are not numbers become 0.
cudaError_t dequantize_all(const Attention& attention, const Rows& keys, const Rows& values, bool with_new,
                           void* stream);

// Which new tokens are not numbers in some channel, bit t of a word for token kChunk * chunk + t: of each sequence
// [num_heads + 2 * kv_num_heads][chunks]. first_chunk: of the tokens at hand.
struct NotNumbers {
  uint32_t* masks;
  int32_t chunks, first_chunk;
};
SKV_HD int chunks_of(int tokens) { return (tokens + kChunk - 1) / kChunk; }
// Tokens of one sequence as dense rows [tokens][(num_heads + 2 * kv_num_heads) * head_dim] of the output's type, with 0
// for what is not a number, and where that stood. Without rows: where, of the values of all sequences.
cudaError_t pack_rows(const Attention& attention, void* rows, const NotNumbers& found, void* stream);
// What the outputs are that see such a token: not numbers.
cudaError_t spread_not_numbers(const Attention& attention, const NotNumbers& found, bool values_only, void* stream);
// Lengths of a call whose tokens are given in pieces (kernels_cuda.h); and zeros, or NaN, in the output rows of
// padding.
cudaError_t piece_lengths(const Attention& attention, int32_t piece, int32_t* lengths, void* stream);
cudaError_t clear_padding(const Attention& attention, void* stream);
// Attention over such rows, of float16 and padded channels; writes the output, or with several splits partial ones.
constexpr int kPrefillRows = 64;  // of queries, in a block
bool prefill_covers(int32_t dim);
cudaError_t prefill(const Attention& attention, const Rows& keys, const Rows& values, void* stream);

cudaError_t decode_tile(const SkvLayout& layout, const uint8_t* tile, float* out, void* stream);
// Gives positions [from, to) of sequence b, which stand in tiles, their full-precision rows back.
cudaError_t rewind(const Cache& cache, int32_t kv_num_heads, int32_t b, int32_t from, int32_t to, void* stream);

}  // namespace skv::cuda
