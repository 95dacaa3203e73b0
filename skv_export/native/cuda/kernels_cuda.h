// The C interface of the CUDA kernels: the functions of kernels.h with the prefix `skv_cuda_`, on device pointers and a
// stream.
//
// Nothing here but skv_cuda_synchronize waits for the device, allocates, or reads device memory on the host; grids
// depend on shapes only. So every call can be captured in a CUDA graph. Arguments are checked before anything is
// launched; what only the device knows (the lengths in seqlens_k and query_seqlens) the kernels check themselves: a
// sequence whose lengths can't be is not touched, and its output is NaN. Each function returns an SkvStatus and leaves
// the reason in skv_cuda_last_error() of the calling thread.
#pragma once
#include "../kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// Which kernels attend. All agree with the reference within the cases' tolerances.
typedef enum SkvCudaPath {
  SKV_CUDA_AUTO = 0,     // the fastest that covers the call: skv_cuda_path names it
  SKV_CUDA_SIMPLE = 1,   // one warp per token, CUDA cores: every layout, every type
  SKV_CUDA_MMA = 2,      // tensor cores straight from the codes: few new tokens, curated layouts
  SKV_CUDA_PREFILL = 3,  // dequantize the past into scratch, then attention on tensor cores: many new tokens
} SkvCudaPath;

// What a call on the device needs beside its tensors.
typedef struct SkvCudaContext {
  void* stream;   // cudaStream_t
  void* scratch;  // device memory, 256-byte aligned, skv_cuda_scratch_bytes of it; may be used by one call at a time
  int64_t scratch_bytes;
  int64_t max_length;   // no sequence's total length is larger (total_sequence_length); checked against the capacity
  int32_t path;         // SkvCudaPath
  int32_t output_type;  // SkvType of the output and of head_sink; -1 = the call's type
  int32_t multiprocessors;  // of the device: how far the context is split
  int64_t rows_bytes;    // of a dequantized past that prefill holds at once: so many sequences and heads go at a time,
                         // one at least; 0 = 256 MiB
  int32_t architecture;  // of the device, for kernels that skv_cuda_load has loaded, and for how far the context is
                         // split; 0 = those that are built in, and as on sm_80
} SkvCudaContext;

// New tokens before QK norm and RoPE; see the op's inputs of these names.
typedef struct SkvCudaPreparation {
  SkvTokens query, key, value;
  int32_t type, batch, tokens, num_heads, kv_num_heads, head_dim;
  const int32_t* seqlens_k;
  const int32_t* query_seqlens;
  const void *cos_cache, *sin_cache;  // [rotary_rows][rotary_half], or null
  int64_t rotary_rows;
  int32_t rotary_half, rotary_interleaved;
  const int64_t* position_ids;                // [batch][tokens], or null = the position in the sequence
  const void *q_norm_weight, *k_norm_weight;  // [head_dim], or null
  float epsilon;
} SkvCudaPreparation;

// Writes float rows [batch][tokens][(num_heads + 2 * kv_num_heads) * head_dim]: queries and keys after QK norm and
// RoPE, and values. A position beyond the tables becomes NaN.
SKV_API int skv_cuda_prepare(const SkvCudaPreparation* preparation, float* rows, void* stream);

// Attention of the new tokens and append; as skv_attention. call->not_finite must be visible to the device; it is only
// ever set to 1.
SKV_API int skv_cuda_attention(const SkvAttention* call, const SkvCudaContext* context);

// The same, and appends nothing: the caches are read only.
SKV_API int skv_cuda_attend(const SkvAttention* call, const SkvCudaContext* context);

// Appends keys and values only.
SKV_API int skv_cuda_append(const SkvAttention* call, const SkvCudaContext* context);

// For attention of somebody else's over dense rows, one sequence at a time and its tokens in pieces:
// the past of sequence b, [kv_num_heads][rows][head_dim] of the output's type in keys and in values, and zeros behind
// it: there is attention (cuDNN's) that multiplies rows which nobody has written by weights of 0;
SKV_API int skv_cuda_dense_rows(const SkvAttention* call, const SkvCudaContext* context, int32_t b, int64_t rows,
                                void* keys, void* values);
// for each piece of so many tokens, and each sequence, [pieces][3][batch]: seqlens_k and query_seqlens of a call with
// these tokens alone behind all before them; and GroupQueryAttention's seqlens_k where all rows of the piece are
// tokens, and the rows of pieces before it that are none are not there;
SKV_API int skv_cuda_piece_lengths(const SkvAttention* call, const SkvCudaContext* context, int32_t piece,
                                   int32_t* lengths);
// the tokens of a call of one sequence as rows [tokens][(num_heads + 2 * kv_num_heads) * head_dim] of the output's
// type, with 0 for what is not a number; where that was stands in masks, which are those of all pieces of the sequence:
// [num_heads + 2 * kv_num_heads][chunks], bit t of a word for token 32 * (chunk - first_chunk) + t of the call;
SKV_API int skv_cuda_pack_rows(const SkvAttention* call, const SkvCudaContext* context, void* rows, uint32_t* masks,
                               int32_t chunks, int32_t first_chunk);
// and afterwards, as skv_cuda_attention leaves them: the outputs that see what is not a number are none, the output of
// rows of padding becomes 0, that of a sequence whose lengths can't be NaN. masks: [batch] of those above.
SKV_API int skv_cuda_finish_rows(const SkvAttention* call, const SkvCudaContext* context, const uint32_t* masks);

// Bytes of scratch that skv_cuda_attention needs for this call; negative = an SkvStatus, negated.
SKV_API int64_t skv_cuda_scratch_bytes(const SkvAttention* call, const SkvCudaContext* context);

// The kernels that such a call takes and why, such as "decode_mma K4V2 D128" or "decode_simple: 5-bit keys"; the
// calling thread's, until its next call. Null = an argument is wrong.
SKV_API const char* skv_cuda_path(const SkvAttention* call, const SkvCudaContext* context);

// As skv_dequantize, skv_decode_tile and skv_rewind, on a stream.
SKV_API int skv_cuda_dequantize(const SkvCache* cache, int32_t kv_num_heads, int32_t b, int32_t h, int64_t length,
                                int32_t type, void* out, int64_t row_stride, void* stream);
SKV_API int skv_cuda_decode_tile(const SkvLayout* layout, const uint8_t* tile, float* out, void* stream);
SKV_API int skv_cuda_rewind(const SkvCache* cache, int32_t kv_num_heads, int32_t b, int64_t length,
                            int64_t longest_length, int64_t new_length, void* stream);

// Kernels that are not built in: decode_mma's for most layouts (docs/gpu.md, Kernels that are compiled). Layouts that
// need none are SKV_OK.
//
// Loads those for these layouts onto the current device, of the architecture that skv_cuda_device gives: from the cache
// folder, else compiled, which takes seconds. SKV_NOT_SUPPORTED: there are none, and calls take decode_simple.
// `say`, which may be null, hears what is done the first time.
typedef void (*SkvCudaSay)(void* log, int32_t is_warning, const char* text);
SKV_API int skv_cuda_load(const SkvLayout* key, const SkvLayout* value, int32_t architecture, SkvCudaSay say,
                          void* log);
// Compiles them into the cache folder; needs no device.
SKV_API int skv_cuda_compile(const SkvLayout* key, const SkvLayout* value, int32_t architecture);
// Where they come from, and in text: the calling thread's, until its next call. Compiles nothing; architecture 0 = any.
typedef enum SkvCudaOrigin {
  SKV_CUDA_NO_KERNEL = 0,  // decode_mma has none for such layouts
  SKV_CUDA_BUILT_IN = 1,
  SKV_CUDA_KEPT = 2,        // in the cache folder
  SKV_CUDA_TO_COMPILE = 3,  // by skv_cuda_load
  SKV_CUDA_MISSING = 4,     // what compiles them was not found
} SkvCudaOrigin;
SKV_API int skv_cuda_origin(const SkvLayout* key, const SkvLayout* value, int32_t architecture, const char** text);

// Whether the current device can run the kernels, its multiprocessors, and its architecture (80 = compute
// capability 8.0).
SKV_API int skv_cuda_device(int32_t* multiprocessors, int32_t* architecture);

// Makes a device the calling thread's: the functions below, and calls on the default stream, mean this one.
SKV_API int skv_cuda_use_device(int32_t device);

// A number that device and host both see, for not_finite; and a copy on the device.
SKV_API int skv_cuda_flag_create(int32_t** flag);
SKV_API void skv_cuda_flag_destroy(int32_t* flag);
SKV_API int skv_cuda_copy(void* to, const void* from, int64_t bytes, void* stream);

// Sets the int64 at an address, and those so many bytes on, one for each row, from 0 to 1.
SKV_API int skv_cuda_set_column(void* first, int64_t row_bytes, int32_t rows, void* stream);

// Waits for what has been started on a stream.
SKV_API int skv_cuda_synchronize(void* stream);

SKV_API const char* skv_cuda_last_error(void);

#ifdef __cplusplus
}
#endif
