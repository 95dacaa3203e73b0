// Launchers, one function per kernel; arguments have been checked (calls.cu).
#pragma once
#include <cmath>
#include <type_traits>

#include "attention.cuh"
#include "kernels_cuda.h"
#include "mma_form.h"

namespace skv::cuda {

constexpr int kChunk = 32;        // tokens that one word of NotNumbers speaks of
constexpr int kPieceLengths = 3;  // of a sequence, for each piece

inline Cache make_cache(const SkvCache& c) {
  const SkvLayout& l = c.layout;
  Cache r{};
  r.layout = l;
  r.data = c.data;
  r.block_bytes = c.block_bytes;
  r.tile_bytes = tile_bytes(l);
  r.code_bytes = code_bytes(l);
  r.rows_start = c.block_bytes - full_bytes(l);
  r.parameter_bytes = int32_t(parameter_bytes(l));
  const bool has_means = l.granularity == SKV_TOKEN_CHANNEL && l.bits != 16;
  r.means = has_means ? int32_t(r.code_bytes) + 2 * num_groups(l) * l.tile_tokens : 0;
  r.dim = padded_dim(l);
  r.tiles = int32_t(tiles_in(l, c.block_bytes));
  r.capacity = int32_t(capacity(l, c.block_bytes));
  r.ring = ring_tokens(l);
  r.groups = num_groups(l);
  r.per_group = 65536 / (l.group_size / 32) + 1;
  r.rotation_dim = l.rotation == SKV_HADAMARD ? rotation_dim(l) : 0;
  r.rotation_scale = float(1.0 / std::sqrt(double(rotation_dim(l))));
  r.basis = c.basis;
  return r;
}

// Calls body(std::integral_constant<int, E>) for the number of channels per lane of a cache. SKV_CUDA_FEW leaves all
// but its head_dim out.
template <class Body>
cudaError_t with_channels(const Cache& c, Body body) {
  switch (c.dim / 32) {
#ifdef SKV_CUDA_FEW
    case SKV_CUDA_FEW / 32:
      return body(std::integral_constant<int, SKV_CUDA_FEW / 32>());
#else
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
    case 5:
      return body(std::integral_constant<int, 5>());
    case 6:
      return body(std::integral_constant<int, 6>());
    case 7:
      return body(std::integral_constant<int, 7>());
    case 8:
      return body(std::integral_constant<int, 8>());
#endif
    default:
      return cudaErrorNotSupported;
  }
}

// QK norm and RoPE: rows [batch * tokens][(num_heads + 2 * kv_num_heads) * head_dim].
cudaError_t prepare(const SkvCudaPreparation& preparation, float* rows, void* stream);

// Queries in the basis of calibrated keys' tiles: rows [batch * tokens][num_heads][D], for tile_query.
cudaError_t turn_queries(const Attention& attention, float* rows, void* stream);

// `combines`: and what combine does for all sequences and heads, in the same launch; not after prefill.
cudaError_t append(const Attention& attention, int32_t* not_finite, bool combines, void* stream);

cudaError_t decode_simple(const Attention& attention, void* stream);

// A kernel of decode_mma, and several.
struct MmaInstance {
  MmaForm form;
  int32_t columns, threads, shared_bytes;
  void (*kernel)(Attention);
};
struct MmaTable {
  const MmaInstance* instances;
  size_t count;
};
// Those of one head_dim that are built in.
MmaTable decode_mma_64();
MmaTable decode_mma_128();
MmaTable decode_mma_256();
// The form that calls with such layouts take, or why decode_mma takes none.
const char* find_form(const SkvLayout& key, const SkvLayout& value, MmaForm& form);
// Its kernel for so many columns of queries, built in or loaded for the architecture; null, and the reason.
const MmaInstance* find_mma(const MmaForm& form, int architecture, int columns, const char** reason);

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
// The past of the launch's sequences and heads, and behind it where `with_new` the new tokens as they are, else zeros;
// the rows begin with the first of them. New values that are not numbers become 0.
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
