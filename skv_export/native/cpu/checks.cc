#include "cpu/checks.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "cpu/isa.h"
#include "layout_check.h"

namespace skv {
namespace {

thread_local char last_error[512] = "";

// The units' arrays have room for every legal layout.
static_assert(kMaxDim == kMaxHeadDim && kMinGroup == kGroupMultiple);
static_assert(kMaxWindow <= INT32_MAX - kMaxRunTokens);

int check_positive(const char* what, int64_t got) {
  if (got >= 1) return SKV_OK;
  return fail(SKV_INVALID_ARGUMENT, "%s; got %lld; expected at least 1", what, static_cast<long long>(got));
}

int check_tokens(const SkvTokens& tokens, const char* what, int64_t heads, int64_t head_dim, bool any) {
  if (any && tokens.data == nullptr) return fail(SKV_INVALID_ARGUMENT, "%s: data; got null; expected a pointer", what);
  if (tokens.token_stride >= heads * head_dim) return SKV_OK;
  return fail(SKV_INVALID_ARGUMENT, "%s: token_stride; got %lld; expected at least %lld (heads * head_dim)", what,
              static_cast<long long>(tokens.token_stride), static_cast<long long>(heads * head_dim));
}

// The two layouts must put every token in the same place.
int check_pair(const SkvLayout& k, const SkvLayout& v) {
  const struct {
    const char* field;
    int32_t key, value;
  } equal[] = {
      {"head_dim", k.head_dim, v.head_dim},
      {"num_sink_tokens", k.num_sink_tokens, v.num_sink_tokens},
      {"recent_tokens", k.recent_tokens, v.recent_tokens},
      {"tile_tokens", k.tile_tokens, v.tile_tokens},
      {"recent_type", k.recent_type, v.recent_type},
      {"local_window_size", k.local_window_size, v.local_window_size},
  };
  for (const auto& e : equal) {
    if (e.key != e.value) {
      return fail(SKV_INVALID_ARGUMENT, "value cache: %s; got %d; expected %d, as the key cache has", e.field, e.value,
                  e.key);
    }
  }
  if (k.is_value != 0) return fail(SKV_INVALID_ARGUMENT, "key cache: is_value; got %d; expected 0", k.is_value);
  if (v.is_value != 1) return fail(SKV_INVALID_ARGUMENT, "value cache: is_value; got %d; expected 1", v.is_value);
  return SKV_OK;
}

int check_lengths(const SkvAttention& call) {
  for (int64_t b = 0; b < call.batch; b++) {
    const int64_t total = total_tokens(call, b), added = new_tokens(call, b);
    const int64_t most = std::min<int64_t>(call.tokens, total);
    if (total < 0) {
      return fail(SKV_INVALID_ARGUMENT, "sequence %lld: seqlens_k; got %lld; expected -1 or more (total length - 1)",
                  static_cast<long long>(b), static_cast<long long>(total - 1));
    }
    if (added < 0 || added > most) {
      return fail(SKV_INVALID_ARGUMENT,
                  "sequence %lld: lengths; got %lld new tokens of %lld in all; expected 0 ... %lld new tokens",
                  static_cast<long long>(b), static_cast<long long>(added), static_cast<long long>(total),
                  static_cast<long long>(most));
    }
    if (added == 0) continue;
    if (int status = check_capacity(call.key_cache, "key", b, total)) return status;
    if (int status = check_capacity(call.value_cache, "value", b, total)) return status;
  }
  return SKV_OK;
}

}  // namespace

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

int check_layout(const SkvLayout& l, const char* tensor) {
  const LayoutProblem problem = find_problem(l);
  if (problem.field == nullptr) return SKV_OK;
  return fail(SKV_INVALID_ARGUMENT, "%s cache: %s; got %lld; expected %s", tensor, problem.field,
              static_cast<long long>(problem.got), problem.expected);
}

namespace {

int check_basis(const SkvCache& cache, const char* tensor) {
  const SkvKeyBasis& basis = cache.basis;
  if (!basis.key && !basis.query && !basis.feedback) return SKV_OK;
  if (!basis.key || !basis.query || !basis.feedback) {
    return fail(SKV_INVALID_ARGUMENT, "%s cache: basis; got some matrices; expected all three or none", tensor);
  }
  if (can_have_basis(cache.layout)) return SKV_OK;
  return fail(SKV_INVALID_ARGUMENT, "%s cache: basis; got %d bits, granularity %s, rotation %s; expected %s", tensor,
              cache.layout.bits, kGranularities[cache.layout.granularity], kRotations[cache.layout.rotation],
              kBasisForm);
}

}  // namespace

int check_cache(const SkvCache& cache, const char* tensor) {
  if (int status = check_layout(cache.layout, tensor)) return status;
  if (int status = check_basis(cache, tensor)) return status;
  if (cache.data == nullptr) {
    return fail(SKV_INVALID_ARGUMENT, "%s cache: data; got null; expected a pointer", tensor);
  }
  if (reinterpret_cast<uintptr_t>(cache.data) % 16 != 0) {
    return fail(SKV_INVALID_ARGUMENT, "%s cache: data; got %p; expected a multiple of 16", tensor,
                static_cast<void*>(cache.data));
  }
  if (cache.block_bytes % 16 != 0 || cache.block_bytes < full_bytes(cache.layout)) {
    return fail(SKV_INVALID_ARGUMENT, "%s cache: block_bytes; got %lld; expected at least %lld, and a multiple of 16",
                tensor, static_cast<long long>(cache.block_bytes), static_cast<long long>(full_bytes(cache.layout)));
  }
  return SKV_OK;
}

int check_capacity(const SkvCache& cache, const char* tensor, int64_t b, int64_t length) {
  const int64_t most = capacity(cache.layout, cache.block_bytes);
  if (most < 0 || length <= most) return SKV_OK;
  return fail(SKV_INVALID_ARGUMENT,
              "%s cache: total length of sequence %lld; got %lld tokens; expected at most its capacity of %lld", tensor,
              static_cast<long long>(b), static_cast<long long>(length), static_cast<long long>(most));
}

int check_call(const SkvAttention& c, bool append_only) {
  if (int status = check_cache(c.key_cache, "key")) return status;
  if (int status = check_cache(c.value_cache, "value")) return status;
  if (int status = check_pair(c.key_cache.layout, c.value_cache.layout)) return status;
  if (c.type == SKV_BFLOAT16) {
    return fail(SKV_NOT_SUPPORTED, "type; got bfloat16; expected float or float16 on the CPU");
  }
  if (c.type != SKV_FLOAT && c.type != SKV_FLOAT16) {
    return fail(SKV_INVALID_ARGUMENT, "type; got %d; expected SKV_FLOAT or SKV_FLOAT16", c.type);
  }
  if (c.batch < 0 || c.tokens < 0) {
    return fail(SKV_INVALID_ARGUMENT, "batch and tokens; got %d and %d; expected 0 or more", c.batch, c.tokens);
  }
  if (int status = check_positive("kv_num_heads", c.kv_num_heads)) return status;
  const bool any = c.batch > 0 && c.tokens > 0;
  const int64_t head_dim = c.key_cache.layout.head_dim;
  if (int status = check_tokens(c.key, "key", c.kv_num_heads, head_dim, any)) return status;
  if (int status = check_tokens(c.value, "value", c.kv_num_heads, head_dim, any)) return status;
  if (c.batch > 0 && c.seqlens_k == nullptr) {
    return fail(SKV_INVALID_ARGUMENT, "seqlens_k; got null; expected a pointer");
  }
  if (!append_only) {
    if (int status = check_positive("num_heads", c.num_heads)) return status;
    if (c.num_heads % c.kv_num_heads != 0) {
      return fail(SKV_INVALID_ARGUMENT, "num_heads; got %d; expected a multiple of kv_num_heads, %d", c.num_heads,
                  c.kv_num_heads);
    }
    if (int status = check_tokens(c.query, "query", c.num_heads, head_dim, any)) return status;
    if (any && c.output == nullptr) return fail(SKV_INVALID_ARGUMENT, "output; got null; expected a pointer");
    if (!(c.scale >= 0) || !(c.softcap >= 0) || c.scale > 3e38f || c.softcap > 3e38f) {
      return fail(SKV_INVALID_ARGUMENT, "scale and softcap; got %g and %g; expected 0 or more, finite",
                  static_cast<double>(c.scale), static_cast<double>(c.softcap));
    }
  }
  return check_lengths(c);
}

bool all_finite(const float* numbers, int64_t n) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, numbers + i, sizeof(bits));
    bad |= (bits & kExponent) == kExponent;
  }
  return bad == 0;
}

int64_t total_tokens(const SkvAttention& call, int64_t b) { return int64_t{call.seqlens_k[b]} + 1; }

int64_t new_tokens(const SkvAttention& call, int64_t b) {
  return call.query_seqlens ? int64_t{call.query_seqlens[b]} : std::min<int64_t>(call.tokens, total_tokens(call, b));
}

}  // namespace skv

extern "C" const char* skv_last_error(void) { return skv::last_error; }
