// Which layouts are legal: the limits that the CPU kernels, the CUDA kernels and the op share. The mirror of the checks
// of CacheLayout in spec/layout.py; a test compares the two over a grid. Included by host code only.
#pragma once
#include <stdio.h>

#include "kv_layout.h"

namespace skv {

constexpr int32_t kBits[] = {1, 2, 3, 4, 5, 6, 8, 16};
constexpr int32_t kTileTokens[] = {32, 64, 128};

// The names of the op's attributes, numbered as SkvGranularity, SkvRotation and SkvType.
constexpr const char* kGranularities[] = {"channel", "token", "token_channel"};
constexpr const char* kRotations[] = {"none", "hadamard"};
constexpr const char* kRecentTypes[] = {"float16", "float", "bfloat16"};

constexpr int32_t kMaxHeadDim = 1024;
constexpr int32_t kGroupMultiple = 32;    // group sizes are multiples of it: kernels have room for so many groups
constexpr int32_t kMaxKeptTokens = 4096;  // sinks, and recent tokens
constexpr int32_t kMaxWindow = 1 << 30;

template <size_t N>
bool is_one_of(int32_t value, const int32_t (&choices)[N]) {
  for (const int32_t choice : choices) {
    if (value == choice) return true;
  }
  return false;
}

inline bool can_have_parameter_bits(int32_t bits, int32_t granularity) {
  return bits == 16 || (bits == 8 && granularity == SKV_CHANNEL);
}

// Whether tiles can hold keys in a basis of their own (spec/key_basis.py: can_be_calibrated), and in words.
inline bool can_have_basis(const SkvLayout& l) {
  return l.is_value == 0 && l.bits != 16 && l.granularity == SKV_CHANNEL && l.rotation == SKV_ROTATION_NONE;
}
constexpr const char* kBasisForm = "keys of fewer than 16 bits, granularity channel, rotation none";

// What is wrong with a layout.
struct LayoutProblem {
  const char* field = nullptr;  // null: nothing
  int64_t got = 0;
  char expected[96] = "";
};

// Looks at every field of a layout, and says what is wrong with the first that is.
inline LayoutProblem find_problem(const SkvLayout& l) {
  LayoutProblem problem;
  const auto bad = [&](const char* field, int64_t got, const char* expected) {
    problem.field = field;
    problem.got = got;
    snprintf(problem.expected, sizeof problem.expected, "%s", expected);
    return problem;
  };
  const auto outside = [&](const char* field, int64_t got, int64_t low, int64_t high) {
    if (got >= low && got <= high) return false;
    bad(field, got, "");
    snprintf(problem.expected, sizeof problem.expected, "%lld ... %lld", static_cast<long long>(low),
             static_cast<long long>(high));
    return true;
  };
  if (outside("head_dim", l.head_dim, 1, kMaxHeadDim)) return problem;
  if (!is_one_of(l.bits, kBits)) return bad("bits", l.bits, "1, 2, 3, 4, 5, 6, 8 or 16");
  if (outside("granularity", l.granularity, SKV_CHANNEL, SKV_TOKEN_CHANNEL)) return problem;
  if (outside("rotation", l.rotation, SKV_ROTATION_NONE, SKV_HADAMARD)) return problem;
  if (l.group_size < 1 || l.group_size % kGroupMultiple != 0 || padded_dim(l) % l.group_size != 0) {
    bad("group_size", l.group_size, "");
    snprintf(problem.expected, sizeof problem.expected, "a divisor of %d (head_dim %d, padded), and a multiple of %d",
             padded_dim(l), l.head_dim, kGroupMultiple);
    return problem;
  }
  if (outside("num_sink_tokens", l.num_sink_tokens, 0, kMaxKeptTokens)) return problem;
  if (outside("recent_tokens", l.recent_tokens, 0, kMaxKeptTokens)) return problem;
  if (!is_one_of(l.tile_tokens, kTileTokens)) return bad("tile_tokens", l.tile_tokens, "32, 64 or 128");
  if (outside("recent_type", l.recent_type, SKV_FLOAT16, SKV_BFLOAT16)) return problem;
  if (outside("is_value", l.is_value, 0, 1)) return problem;
  if (outside("local_window_size", l.local_window_size, 0, kMaxWindow)) return problem;
  if (!can_have_parameter_bits(l.parameter_bits, l.granularity)) {
    return bad("parameter_bits", l.parameter_bits, "16, or 8 with granularity channel");
  }
  return problem;
}

}  // namespace skv
