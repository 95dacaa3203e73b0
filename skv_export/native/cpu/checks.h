// Checks of the arguments of kernels.h, and the thread's last error.
#pragma once
#include "kernels.h"

namespace skv {

// Most tokens of a sequence: what seqlens_k, an int32, can say.
constexpr int64_t kMaxLength = int64_t{1} << 31;

// Notes the reason of a failure (printf style) for skv_last_error, and returns `status`.
__attribute__((format(printf, 2, 3))) int fail(int status, const char* format, ...);

// Checks the layout's fields; `tensor` ("key" or "value") starts the message.
int check_layout(const SkvLayout& layout, const char* tensor);

// Checks a cache's layout, pointer and block size.
int check_cache(const SkvCache& cache, const char* tensor);

// Checks that blocks of this size hold `length` tokens.
int check_capacity(const SkvCache& cache, const char* tensor, int64_t b, int64_t length);

// Checks a whole call; `append_only`: query, output and head_sink are not looked at.
int check_call(const SkvAttention& call, bool append_only);

// Whether n numbers are all finite.
bool all_finite(const float* numbers, int64_t n);

// Total tokens of sequence b after the call, and those that the call adds.
int64_t total_tokens(const SkvAttention& call, int64_t b);
int64_t new_tokens(const SkvAttention& call, int64_t b);

}  // namespace skv
