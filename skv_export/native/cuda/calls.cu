// The functions of kernels_cuda.h: their checks, the choice of kernels, scratch memory, and the order of launches.
#include <cstdarg>
#include <cstdio>

#include "errors.h"
#include "launchers.h"
#include "../layout_check.h"

namespace skv::cuda {

static thread_local char last_error[1024];

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

namespace {

constexpr int kMaxSplits = 256;
constexpr int64_t kMaxGrid = 65535;                 // of a grid's y and z
constexpr int64_t kRowsBytes = int64_t{256} << 20;  // of prefill, where the context names no other (docs/gpu.md)

thread_local char path_text[1024];

int wrong(const char* what, int64_t got, const char* expected) {
  return fail(SKV_INVALID_ARGUMENT, "%s; got %lld; expected %s", what, static_cast<long long>(got), expected);
}
int finished(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return SKV_OK;
  return fail(SKV_RUNTIME_ERROR, "CUDA kernel %s: launch failed; got %s", kernel, cudaGetErrorString(error));
}

int check_layout(const SkvLayout& l) {
  const char* tensor = l.is_value ? "value" : "key";
  const LayoutProblem problem = find_problem(l);
  if (problem.field) {
    return fail(SKV_INVALID_ARGUMENT, "%s cache: %s; got %lld; expected %s", tensor, problem.field,
                static_cast<long long>(problem.got), problem.expected);
  }
  if (padded_dim(l) > kMaxDim) {
    return fail(SKV_NOT_SUPPORTED, "%s cache: head_dim; got %d; expected at most %d on CUDA", tensor, l.head_dim,
                kMaxDim);
  }
  return SKV_OK;
}

int check_cache(const SkvCache& c) {
  if (const int status = check_layout(c.layout)) return status;
  const char* tensor = c.layout.is_value ? "value" : "key";
  if (c.block_bytes % 16 || tiles_in(c.layout, c.block_bytes) < 0 || c.block_bytes > (int64_t{1} << 40)) {
    return fail(SKV_INVALID_ARGUMENT, "%s cache: block bytes; got %lld; expected a multiple of 16, at least %lld",
                tensor, static_cast<long long>(c.block_bytes), static_cast<long long>(full_bytes(c.layout)));
  }
  if (capacity(c.layout, c.block_bytes) >= (1 << 30))
    return wrong("cache: capacity", c.block_bytes, "below 2^30 tokens");
  const bool any = c.basis.key || c.basis.query || c.basis.feedback;
  if (any && !(c.basis.key && c.basis.query && c.basis.feedback)) {
    return fail(SKV_INVALID_ARGUMENT, "%s cache: basis; got some matrices; expected all three or none", tensor);
  }
  if (any && !can_have_basis(c.layout)) {
    return fail(SKV_INVALID_ARGUMENT, "%s cache: basis; got %d bits, granularity %s, rotation %s; expected %s", tensor,
                c.layout.bits, kGranularities[c.layout.granularity], kRotations[c.layout.rotation], kBasisForm);
  }
  if (!c.data) return fail(SKV_INVALID_ARGUMENT, "%s cache: data; got null; expected a device pointer", tensor);
  if (reinterpret_cast<uintptr_t>(c.data) % 16)
    return wrong("cache: address", int64_t(uintptr_t(c.data)), "16-byte aligned");
  return SKV_OK;
}

int check_length(const SkvCache& c, int64_t length) {
  const int64_t most = capacity(c.layout, c.block_bytes);
  if (length < 0 || length >= (1 << 30)) return wrong("total length", length, "0 or more, below 2^30");
  if (most >= 0 && length > most) {
    return fail(SKV_INVALID_ARGUMENT, "%s cache: total length; got %lld tokens; expected at most its capacity of %lld",
                c.layout.is_value ? "value" : "key", static_cast<long long>(length), static_cast<long long>(most));
  }
  return SKV_OK;
}

bool same_tokens(const SkvLayout& k, const SkvLayout& v) {
  return k.head_dim == v.head_dim && k.num_sink_tokens == v.num_sink_tokens && k.recent_tokens == v.recent_tokens &&
         k.tile_tokens == v.tile_tokens && k.recent_type == v.recent_type && k.local_window_size == v.local_window_size;
}

int check_call(const SkvAttention& call, const SkvCudaContext& context, bool attends) {
  for (const SkvCache* cache : {&call.key_cache, &call.value_cache}) {
    if (const int status = check_cache(*cache)) return status;
    if (const int status = check_length(*cache, context.max_length)) return status;
  }
  if (call.key_cache.layout.is_value || !call.value_cache.layout.is_value) {
    return fail(SKV_INVALID_ARGUMENT, "caches; got key and value exchanged; expected key_cache, value_cache");
  }
  if (!same_tokens(call.key_cache.layout, call.value_cache.layout)) {
    return fail(SKV_INVALID_ARGUMENT,
                "caches; got layouts that differ in head_dim, sinks, recent tokens, tile, type or window; "
                "expected one for keys and values");
  }
  if (call.type < SKV_FLOAT16 || call.type > SKV_BFLOAT16) return wrong("type", call.type, "0, 1 or 2");
  if (context.output_type < -1 || context.output_type > SKV_BFLOAT16)
    return wrong("output_type", context.output_type, "-1 ... 2");
  if (call.batch < 0 || call.tokens < 0 || call.tokens >= (1 << 24)) return wrong("tokens", call.tokens, "0 ... 2^24");
  if (call.kv_num_heads < 1 || call.num_heads < 1 || call.num_heads % call.kv_num_heads) {
    return wrong("num_heads", call.num_heads, "a multiple of kv_num_heads");
  }
  if (int64_t{call.batch} * call.kv_num_heads > kMaxGrid) {
    return wrong("batch * kv_num_heads", int64_t{call.batch} * call.kv_num_heads, "at most 65535 on CUDA");
  }
  const int64_t queries = int64_t{call.tokens} * (call.num_heads / call.kv_num_heads);
  if (attends && queries > INT32_MAX - 1024) {
    return wrong("tokens * num_heads / kv_num_heads", queries, "below 2^31 - 1024 on CUDA");
  }
  if (!call.seqlens_k || !call.key.data || !call.value.data || (attends && (!call.query.data || !call.output))) {
    return fail(SKV_INVALID_ARGUMENT, "query, key, value, output or seqlens_k; got null; expected device pointers");
  }
  if (attends && !(call.softcap >= 0 && call.scale >= 0)) {
    return fail(SKV_INVALID_ARGUMENT, "scale or softcap; got a negative number; expected 0 or more");
  }
  if (context.rows_bytes < 0) return wrong("rows_bytes", context.rows_bytes, "0 or more");
  if (context.path < SKV_CUDA_AUTO || context.path > SKV_CUDA_PREFILL) return wrong("path", context.path, "0 ... 3");
  return SKV_OK;
}

Attention describe(const SkvAttention& call, const SkvCudaContext& context) {
  Attention a{};
  a.key = make_cache(call.key_cache);
  a.value = make_cache(call.value_cache);
  const int32_t head_dim = call.key_cache.layout.head_dim;
  a.query = {call.query.data, call.query.token_stride, call.type, head_dim};
  a.new_key = {call.key.data, call.key.token_stride, call.type, head_dim};
  a.new_value = {call.value.data, call.value.token_stride, call.type, head_dim};
  a.lengths = {call.seqlens_k, call.query_seqlens, call.tokens, int32_t(context.max_length)};
  a.batch = call.batch;
  a.num_heads = call.num_heads;
  a.kv_num_heads = call.kv_num_heads;
  a.pairs = call.batch * call.kv_num_heads;
  a.columns = call.tokens * a.group();
  a.window = call.key_cache.layout.local_window_size;
  a.scale = call.scale != 0 ? call.scale : float(1.0 / std::sqrt(double(head_dim)));
  a.softcap = call.softcap;
  a.output = call.output;
  a.head_sink = call.head_sink;
  a.output_type = context.output_type >= 0 ? context.output_type : call.type;
  return a;
}

// Which kernels a call takes.
struct Plan {
  int path;
  const MmaInstance* mma;
  const char* reason;  // why not decode_mma
  int pairs;           // sequences and heads that are dequantized at a time
  int64_t partial_bytes, peak_bytes, query_bytes, rows_bytes, mask_bytes, scratch_bytes;
};

// Splits of the context, from shapes alone: blocks for all places on the device, and no more than there are pieces for
// their warps. What a length below the capacity leaves without work costs a peak each.
int splits_for(const Attention& a, const SkvCudaContext& context, int columns_per_block, int resident, int warps) {
  const int64_t groups = (a.columns + columns_per_block - 1) / columns_per_block;
  const int64_t blocks = int64_t{a.batch} * a.kv_num_heads * groups;
  const int64_t pieces = a.key.tiles + (full_rows(a.key.layout) + a.lengths.tokens + 31) / 32;
  const int64_t multiprocessors = context.multiprocessors < 1 ? 1 : context.multiprocessors;
  const int64_t places = resident * multiprocessors / (blocks < 1 ? 1 : blocks), shares = (pieces + warps - 1) / warps;
  const int64_t most = places < kMaxSplits ? places : kMaxSplits;
  return int(most < 1 ? 1 : most < shares ? most : shares);
}

// The same for prefill: where its blocks alone fill the device twice, the context is not split; and a split has four
// blocks of keys or more.
int prefill_splits(const Attention& a, const SkvCudaContext& context, int pairs) {
  const int64_t blocks = int64_t{pairs} * ((a.columns + kPrefillRows - 1) / kPrefillRows);
  const int64_t wanted = 2 * int64_t{context.multiprocessors} / blocks;
  const int64_t seen = a.window > 0 && a.window + a.lengths.tokens < context.max_length ? a.window + a.lengths.tokens
                                                                                        : context.max_length;
  const int64_t most = seen / 256 < kMaxSplits ? seen / 256 : kMaxSplits;
  return int(wanted < most ? (wanted < 1 ? 1 : wanted) : (most < 1 ? 1 : most));
}

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// The kernel of decode_mma for a call, with the architecture that the context names; null, and the reason.
const MmaInstance* mma_for(const Attention& a, const SkvCudaContext& context, const char** reason) {
  MmaForm form;
  const bool in_float = a.query.type == SKV_FLOAT && a.output_type == SKV_FLOAT;
  *reason = in_float                              ? "float32 inputs"
            : a.lengths.tokens > kMaxDecodeTokens ? "more than 8 new tokens"
                                                  : find_form(a.key.layout, a.value.layout, form);
  return *reason ? nullptr : find_mma(form, context.architecture, a.columns, reason);
}

Plan plan(Attention& a, const SkvCudaContext& context) {
  Plan p{};
  const char* reason = "asked for";
  const bool in_float = a.query.type == SKV_FLOAT && a.output_type == SKV_FLOAT;
  const bool many = a.lengths.tokens > kMaxDecodeTokens && context.path == SKV_CUDA_AUTO;
  if (context.path == SKV_CUDA_AUTO || context.path == SKV_CUDA_MMA) p.mma = mma_for(a, context, &reason);
  if ((many || context.path == SKV_CUDA_PREFILL) && prefill_covers(a.key.dim) && !in_float) {
    p.path = SKV_CUDA_PREFILL;
    const int64_t one = context.max_length * a.key.dim * int64_t{sizeof(half)};
    const int64_t fitting = (context.rows_bytes > 0 ? context.rows_bytes : kRowsBytes) / (2 * one + 1);
    p.pairs = int(fitting < 1 ? 1 : fitting < a.pairs ? fitting : a.pairs);
    p.rows_bytes = aligned(p.pairs * one);
    p.mask_bytes = aligned(int64_t{a.batch} * (a.num_heads + 2 * a.kv_num_heads) * chunks_of(a.lengths.tokens) *
                           int64_t{sizeof(uint32_t)});
    a.splits = prefill_splits(a, context, p.pairs);
    if (a.splits > 1) {
      const int64_t rows = int64_t{p.pairs} * a.splits * a.columns;
      p.partial_bytes = aligned(rows * a.key.dim * int64_t{sizeof(float)});
      p.peak_bytes = aligned(rows * int64_t{sizeof(float2)});
    }
    p.scratch_bytes = 2 * p.rows_bytes + p.mask_bytes + p.partial_bytes + p.peak_bytes;
    return p;
  }
  if (p.mma) {
    p.path = SKV_CUDA_MMA;
  } else {
    p.path = SKV_CUDA_SIMPLE;
    p.reason = reason;
  }
  if (p.mma) {
    const int resident = resident_blocks(p.mma->form, p.mma->columns / 8, context.architecture);
    a.splits = splits_for(a, context, p.mma->columns, resident, p.mma->threads / 32);
  } else {
    a.splits = splits_for(a, context, 4, 4, 1);
  }
  const int64_t rows = int64_t{a.batch} * a.kv_num_heads * a.splits * a.columns;
  p.partial_bytes = aligned(rows * a.key.dim * sizeof(float));
  p.peak_bytes = aligned(rows * sizeof(float2));
  if (a.key.basis.query) {
    p.query_bytes = aligned(int64_t{a.batch} * a.lengths.tokens * a.num_heads * a.key.dim * sizeof(float));
  }
  p.scratch_bytes = p.partial_bytes + p.peak_bytes + p.query_bytes;
  return p;
}

int check_plan(const Attention& a, const Plan& p) {
  if (p.path != SKV_CUDA_SIMPLE || a.columns <= 4 * kMaxGrid) return SKV_OK;
  return fail(SKV_INVALID_ARGUMENT,
              "tokens * num_heads / kv_num_heads; got %d; expected at most %lld for decode_simple. Give a prompt in "
              "pieces, or export with --dtype fp16 or bf16.",
              a.columns, static_cast<long long>(4 * kMaxGrid));
}

int attend_to_rows(Attention& a, const Plan& p, uint8_t* scratch, const SkvCudaContext& context) {
  const int32_t dim = a.key.dim;
  const Rows keys = make_rows(scratch, context.max_length, dim, SKV_FLOAT16, dim);
  const Rows values = make_rows(scratch + p.rows_bytes, context.max_length, dim, SKV_FLOAT16, dim);
  const NotNumbers found{reinterpret_cast<uint32_t*>(scratch + 2 * p.rows_bytes), chunks_of(a.lengths.tokens), 0};
  a.partial = reinterpret_cast<float*>(scratch + 2 * p.rows_bytes + p.mask_bytes);
  a.peaks = reinterpret_cast<float2*>(reinterpret_cast<uint8_t*>(a.partial) + p.partial_bytes);
  a.in_model_basis = true;
  const int32_t all = a.pairs;
  for (a.first_pair = 0; a.first_pair < all; a.first_pair += p.pairs) {
    a.pairs = p.pairs < all - a.first_pair ? p.pairs : all - a.first_pair;
    const cudaError_t error = dequantize_all(a, keys, values, true, context.stream);
    if (const int status = finished(error, "dequantize_all")) return status;
    if (const int status = finished(prefill(a, keys, values, context.stream), "prefill")) return status;
    if (a.splits == 1) continue;
    if (const int status = finished(combine(a, context.stream), "combine")) return status;
  }
  if (const int status = finished(pack_rows(a, nullptr, found, context.stream), "pack_rows")) return status;
  return finished(spread_not_numbers(a, found, true, context.stream), "spread_not_numbers");
}

// Attention, and the append behind it where the call `appends`.
int attend(Attention& a, const Plan& p, const SkvAttention& call, bool appends, const SkvCudaContext& context) {
  uint8_t* scratch = static_cast<uint8_t*>(context.scratch);
  if (p.path == SKV_CUDA_PREFILL) {
    if (const int status = attend_to_rows(a, p, scratch, context)) return status;
    return appends ? finished(append(a, call.not_finite, false, context.stream), "append") : SKV_OK;
  }
  a.partial = reinterpret_cast<float*>(scratch);
  a.peaks = reinterpret_cast<float2*>(scratch + p.partial_bytes);
  if (p.query_bytes) {
    float* rows = reinterpret_cast<float*>(scratch + p.partial_bytes + p.peak_bytes);
    if (const int status = finished(turn_queries(a, rows, context.stream), "turn_queries")) return status;
    a.tile_query = {rows, int64_t{a.num_heads} * a.key.dim, SKV_FLOAT, a.key.dim};
  }
  if (p.mma) {
    const dim3 grid(a.splits, a.batch * a.kv_num_heads, (a.columns + p.mma->columns - 1) / p.mma->columns);
    const cudaError_t error = launch(p.mma->kernel, grid, p.mma->threads, p.mma->shared_bytes, context.stream, a);
    if (const int status = finished(error, "decode_mma")) return status;
  } else if (const int status = finished(decode_simple(a, context.stream), "decode_simple")) {
    return status;
  }
  if (appends) return finished(append(a, call.not_finite, true, context.stream), "append");
  return finished(combine(a, context.stream), "combine");
}

int run(const SkvAttention& call, const SkvCudaContext& context, bool appends) {
  if (const int status = check_call(call, context, true)) return status;
  if (call.batch == 0 || call.tokens == 0) return SKV_OK;
  Attention a = describe(call, context);
  const Plan p = plan(a, context);
  if (const int status = check_plan(a, p)) return status;
  if (!context.scratch || context.scratch_bytes < p.scratch_bytes) {
    return fail(SKV_INVALID_ARGUMENT, "scratch; got %lld bytes; expected %lld",
                static_cast<long long>(context.scratch_bytes), static_cast<long long>(p.scratch_bytes));
  }
  return attend(a, p, call, appends, context);
}

}  // namespace
}  // namespace skv::cuda

using namespace skv::cuda;
using skv::kGranularities;
using skv::quantized_tokens;
using skv::rewind_floor;
using skv::ring_tokens;

int skv_cuda_attend(const SkvAttention* call, const SkvCudaContext* context) { return run(*call, *context, false); }

int skv_cuda_attention(const SkvAttention* call, const SkvCudaContext* context) { return run(*call, *context, true); }

int skv_cuda_append(const SkvAttention* call, const SkvCudaContext* context) {
  if (const int status = check_call(*call, *context, false)) return status;
  if (call->batch == 0 || call->tokens == 0) return SKV_OK;
  return finished(append(describe(*call, *context), call->not_finite, false, context->stream), "append");
}

int skv_cuda_dense_rows(const SkvAttention* call, const SkvCudaContext* context, int32_t b, int64_t rows, void* keys,
                        void* values) {
  if (const int status = check_call(*call, *context, true)) return status;
  if (b < 0 || b >= call->batch) return wrong("sequence", b, "one of the batch");
  if (rows < context->max_length) return wrong("rows", rows, "max_length or more");
  if (!keys || !values) return fail(SKV_INVALID_ARGUMENT, "rows; got null; expected device pointers");
  Attention a = describe(*call, *context);
  a.first_pair = b * a.kv_num_heads;
  a.pairs = a.kv_num_heads;
  const int32_t head_dim = call->key_cache.layout.head_dim;
  const cudaError_t error =
      dequantize_all(a, make_rows(keys, rows, head_dim, a.output_type, head_dim),
                     make_rows(values, rows, head_dim, a.output_type, head_dim), false, context->stream);
  return finished(error, "dequantize_all");
}

int skv_cuda_piece_lengths(const SkvAttention* call, const SkvCudaContext* context, int32_t piece, int32_t* lengths) {
  if (const int status = check_call(*call, *context, true)) return status;
  if (piece < 1) return wrong("piece", piece, "1 or more");
  if (!lengths) return fail(SKV_INVALID_ARGUMENT, "lengths; got null; expected a device pointer");
  return finished(piece_lengths(describe(*call, *context), piece, lengths, context->stream), "piece_lengths");
}

int skv_cuda_pack_rows(const SkvAttention* call, const SkvCudaContext* context, void* rows, uint32_t* masks,
                       int32_t chunks, int32_t first_chunk) {
  if (const int status = check_call(*call, *context, true)) return status;
  if (call->batch != 1) return wrong("batch", call->batch, "1");
  if (first_chunk < 0 || chunks - first_chunk < chunks_of(call->tokens))
    return wrong("chunks", chunks, "those of the tokens");
  if (!rows || !masks) return fail(SKV_INVALID_ARGUMENT, "rows or masks; got null; expected device pointers");
  return finished(pack_rows(describe(*call, *context), rows, {masks, chunks, first_chunk}, context->stream),
                  "pack_rows");
}

int skv_cuda_finish_rows(const SkvAttention* call, const SkvCudaContext* context, const uint32_t* masks) {
  if (const int status = check_call(*call, *context, true)) return status;
  if (!masks) return fail(SKV_INVALID_ARGUMENT, "masks; got null; expected a device pointer");
  const Attention a = describe(*call, *context);
  const NotNumbers found{const_cast<uint32_t*>(masks), chunks_of(call->tokens), 0};
  const cudaError_t error = spread_not_numbers(a, found, false, context->stream);
  if (const int status = finished(error, "spread_not_numbers")) return status;
  return finished(clear_padding(a, context->stream), "clear_padding");
}

int64_t skv_cuda_scratch_bytes(const SkvAttention* call, const SkvCudaContext* context) {
  if (const int status = check_call(*call, *context, true)) return -status;
  Attention a = describe(*call, *context);
  const Plan p = plan(a, *context);
  if (const int status = check_plan(a, p)) return -status;
  return p.scratch_bytes;
}

const char* skv_cuda_path(const SkvAttention* call, const SkvCudaContext* context) {
  if (check_call(*call, *context, true)) return nullptr;
  Attention a = describe(*call, *context);
  const Plan p = plan(a, *context);
  if (p.path == SKV_CUDA_PREFILL) {
    snprintf(path_text, sizeof path_text, "prefill D%d", a.key.dim);
  } else if (p.mma) {
    const MmaForm& form = p.mma->form;
    snprintf(path_text, sizeof path_text, "decode_mma K%dV%d D%d, keys %s, values %s", form.k_bits, form.v_bits,
             form.dim, kGranularities[a.key.layout.granularity], kGranularities[a.value.layout.granularity]);
  } else {
    snprintf(path_text, sizeof path_text, "decode_simple: %s", p.reason);
  }
  return path_text;
}

int skv_cuda_prepare(const SkvCudaPreparation* p, float* rows, void* stream) {
  if (p->head_dim < 1 || p->head_dim > kMaxDim) {
    return fail(SKV_NOT_SUPPORTED, "head_dim; got %d; expected 1 ... %d on CUDA", p->head_dim, kMaxDim);
  }
  if (p->type < SKV_FLOAT16 || p->type > SKV_BFLOAT16) return wrong("type", p->type, "0, 1 or 2");
  if (p->num_heads < 1 || p->kv_num_heads < 1) return wrong("num_heads", p->num_heads, "1 or more");
  if (p->cos_cache && 2 * p->rotary_half > p->head_dim)
    return wrong("cos_cache: columns", p->rotary_half, "head_dim / 2 or less");
  if (p->batch == 0 || p->tokens == 0) return SKV_OK;
  if (!rows || !p->query.data || !p->key.data || !p->value.data || !p->seqlens_k || !p->cos_cache != !p->sin_cache) {
    return fail(SKV_INVALID_ARGUMENT, "tokens, rows or tables; got null; expected device pointers");
  }
  return finished(prepare(*p, rows, stream), "prepare");
}

int skv_cuda_dequantize(const SkvCache* cache, int32_t kv_num_heads, int32_t b, int32_t h, int64_t length, int32_t type,
                        void* out, int64_t row_stride, void* stream) {
  if (!cache) return fail(SKV_INVALID_ARGUMENT, "cache; got null; expected a pointer");
  if (const int status = check_cache(*cache)) return status;
  if (const int status = check_length(*cache, length)) return status;
  if (b < 0 || h < 0 || h >= kv_num_heads) return wrong("head", h, "a head of the cache");
  if (type < SKV_FLOAT16 || type > SKV_BFLOAT16) return wrong("type", type, "0, 1 or 2");
  if (row_stride < cache->layout.head_dim) return wrong("row_stride", row_stride, "head_dim or more");
  if (length == 0) return SKV_OK;
  if (!out) return fail(SKV_INVALID_ARGUMENT, "out; got null; expected a device pointer");
  const Rows rows = make_rows(out, 0, row_stride, type, cache->layout.head_dim);
  return finished(dequantize(make_cache(*cache), rows, b, kv_num_heads, h, int32_t(length), stream), "dequantize");
}

int skv_cuda_decode_tile(const SkvLayout* layout, const uint8_t* tile, float* out, void* stream) {
  if (const int status = check_layout(*layout)) return status;
  if (!tile || !out) return fail(SKV_INVALID_ARGUMENT, "tile or out; got null; expected device pointers");
  return finished(decode_tile(*layout, tile, out, stream), "decode_tile");
}

int skv_cuda_rewind(const SkvCache* cache, int32_t kv_num_heads, int32_t b, int64_t length, int64_t longest_length,
                    int64_t new_length, void* stream) {
  if (!cache) return fail(SKV_INVALID_ARGUMENT, "cache; got null; expected a pointer");
  if (const int status = check_cache(*cache)) return status;
  if (const int status = check_length(*cache, length)) return status;
  if (const int status = check_length(*cache, longest_length)) return status;
  if (longest_length < length) return wrong("longest_length", longest_length, "the length or more");
  if (b < 0 || kv_num_heads < 1 || kv_num_heads > kMaxGrid) return wrong("kv_num_heads", kv_num_heads, "1 ... 65535");
  const SkvLayout& l = cache->layout;
  const int64_t floor = rewind_floor(l, cache->block_bytes, length, longest_length);
  if (new_length < floor || new_length > length) {
    return fail(SKV_INVALID_ARGUMENT, "rewind from %lld tokens; got %lld; expected %lld ... %lld (recent_tokens = %d)",
                static_cast<long long>(length), static_cast<long long>(new_length), static_cast<long long>(floor),
                static_cast<long long>(length), l.recent_tokens);
  }
  const int32_t from = l.num_sink_tokens + int32_t(quantized_tokens(l, new_length));
  const int32_t tiled = l.num_sink_tokens + int32_t(quantized_tokens(l, length));
  const int32_t overwritten = int32_t(longest_length) - ring_tokens(l);  // later ones still have their rows
  const int32_t to = tiled < overwritten ? tiled : overwritten;
  if (from >= to) return SKV_OK;
  return finished(rewind(make_cache(*cache), kv_num_heads, b, from, to, stream), "rewind");
}

const char* skv_cuda_last_error(void) { return last_error; }
