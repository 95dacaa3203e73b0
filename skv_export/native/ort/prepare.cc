// Implementation of ort/prepare.h. Float32 throughout, every operation rounded by itself: the keys' bytes depend on it.
#include "ort/prepare.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/checks.h"

namespace skv::ort {
namespace {

constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kElementsPerTask = 1 << 14;

float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, magnitude = half & 0x7fffu;
  uint32_t bits = (magnitude << 13) + 0x38000000u;  // rebias the exponent by 127 - 15
  if (magnitude >= 0x7c00u) bits += 0x38000000u;    // infinity, not a number
  if (magnitude < 0x0400u) {                        // zero, subnormal: magnitude * 2^-24
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, sizeof(bits));
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

uint16_t half_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;   // not a number
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65520 or more
  if (bits < 0x38800000u) {                        // subnormal: the addition rounds at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  const uint32_t odd = bits >> 13 & 1;
  return static_cast<uint16_t>(sign | ((bits + 0xfffu + odd - 0x38000000u) >> 13));
}

void load_floats(const void* source, ElementType type, int64_t offset, float* target, int64_t count) {
  if (type == ElementType::kFloat) {
    std::copy_n(static_cast<const float*>(source) + offset, count, target);
  } else {
    half_to_float(static_cast<const uint16_t*>(source) + offset, target, count);
  }
}

// Sum of squares as a halving tree over the next power of two (reference.tree_sum).
float sum_of_squares(const float* x, int64_t count) {
  int64_t size = 1;
  while (size < count) size *= 2;
  float sums[kMaxHeadDim];
  for (int64_t i = 0; i < size; ++i) sums[i] = i < count ? x[i] * x[i] : 0.0f;
  for (size /= 2; size > 0; size /= 2) {
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[i + size];
  }
  return sums[0];
}

void rms_norm(float* x, const float* weight, int64_t count, float epsilon) {
  const float root = std::sqrt(sum_of_squares(x, count) / static_cast<float>(count) + epsilon);
  for (int64_t i = 0; i < count; ++i) x[i] = x[i] / root * weight[i];
}

void rope(float* x, const float* cos, const float* sin, int64_t half, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, partner = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float &a = x[i * step], &b = x[i * step + partner];
    const float a0 = a, b0 = b;
    a = a0 * cos[i] - b0 * sin[i];
    b = b0 * cos[i] + a0 * sin[i];
  }
}

int64_t position_of(const Call& call, const SkvAttention& lengths, int64_t b, int64_t t) {
  if (call.position_ids) return call.position_ids.as<int64_t>()[b * call.tokens + t];
  return total_tokens(lengths, b) - new_tokens(lengths, b) + t;
}

void check_positions(const Call& call, const SkvAttention& lengths) {
  const int64_t positions = call.cos_cache.shape[0];
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t t = 0; t < new_tokens(lengths, b); ++t) {
      const int64_t position = position_of(call, lengths, b, t);
      if (position < 0 || position >= positions) {
        fail("position of token " + std::to_string(t) + " of sequence " + std::to_string(b), std::to_string(position),
             "0 ... " + std::to_string(positions - 1) + " (rows of cos_cache)");
      }
    }
  }
}

// One call's work, token by token: tokens are the unit that threads share.
class Preparation {
 public:
  Preparation(const Call& call, const SkvAttention& lengths, float* rows, Scratch& scratch)
      : call_(call), lengths_(lengths), rows_(rows), row_size_(call.hidden_size() + 2 * call.kv_hidden_size()) {
    for (auto [weight, target] : {std::pair{&call.q_norm_weight, &q_weight_}, {&call.k_norm_weight, &k_weight_}}) {
      if (!*weight) continue;
      float* floats = scratch.take<float>(call.head_dim);
      load_floats(weight->data, call.type, 0, floats, call.head_dim);
      *target = floats;
    }
  }

  void token(int64_t b, int64_t t) const {
    const int64_t index = b * call_.tokens + t, hidden = call_.hidden_size(), kv_hidden = call_.kv_hidden_size();
    float* row = rows_ + index * row_size_;
    if (call_.packed) {
      load_floats(call_.query.data, call_.type, index * row_size_, row, row_size_);
    } else {
      load_floats(call_.query.data, call_.type, index * hidden, row, hidden);
      load_floats(call_.key.data, call_.type, index * kv_hidden, row + hidden, kv_hidden);
      load_floats(call_.value.data, call_.type, index * kv_hidden, row + hidden + kv_hidden, kv_hidden);
    }
    const Attributes& a = call_.attributes;
    if (q_weight_) norm_heads(row, a.num_heads, q_weight_);
    if (k_weight_) norm_heads(row + hidden, a.kv_num_heads, k_weight_);
    if (a.do_rotary) rope_heads(row, a.num_heads + a.kv_num_heads, position_of(call_, lengths_, b, t));
  }

 private:
  void norm_heads(float* x, int64_t heads, const float* weight) const {
    for (int64_t h = 0; h < heads; ++h, x += call_.head_dim) {
      rms_norm(x, weight, call_.head_dim, call_.attributes.qk_norm_epsilon);
    }
  }

  void rope_heads(float* x, int64_t heads, int64_t position) const {
    const int64_t half = call_.cos_cache.shape[1];
    float cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
    load_floats(call_.cos_cache.data, call_.type, position * half, cos, half);
    load_floats(call_.sin_cache.data, call_.type, position * half, sin, half);
    for (int64_t h = 0; h < heads; ++h, x += call_.head_dim)
      rope(x, cos, sin, half, call_.attributes.rotary_interleaved);
  }

  const Call& call_;
  const SkvAttention& lengths_;
  float* rows_;
  int64_t row_size_;
  const float *q_weight_ = nullptr, *k_weight_ = nullptr;
};

NewTokens packed_tokens(const void* rows, const Call& call, SkvType type) {
  const size_t bytes = type == SKV_FLOAT ? 4 : 2;
  const auto* start = static_cast<const uint8_t*>(rows);
  const int64_t hidden = call.hidden_size(), kv_hidden = call.kv_hidden_size(), stride = hidden + 2 * kv_hidden;
  return {
      {start, stride}, {start + hidden * bytes, stride}, {start + (hidden + kv_hidden) * bytes, stride}, type, true};
}

}  // namespace

void half_to_float(const uint16_t* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = float_of_half(source[i]);
}

void float_to_half(const float* source, uint16_t* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = half_of_float(source[i]);
}

NewTokens tokens_in_place(const Call& call) {
  const SkvType type = call.type == ElementType::kFloat ? SKV_FLOAT : SKV_FLOAT16;
  if (call.packed) return packed_tokens(call.query.data, call, type);
  return {{call.query.data, call.hidden_size()},
          {call.key.data, call.kv_hidden_size()},
          {call.value.data, call.kv_hidden_size()},
          type,
          false};
}

NewTokens prepare_tokens(const Call& call, const SkvAttention& lengths, OrtKernelContext* context, Scratch& scratch) {
  if (call.attributes.do_rotary) check_positions(call, lengths);
  const int64_t row_size = call.hidden_size() + 2 * call.kv_hidden_size();
  float* rows = scratch.take<float>(int64_t{call.batch} * call.tokens * row_size);
  const Preparation preparation(call, lengths, rows, scratch);
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / row_size);
  const int64_t tasks = (call.tokens + per_task - 1) / per_task;
  const auto body = [&](size_t task) {
    const int64_t b = static_cast<int64_t>(task) / tasks, first = static_cast<int64_t>(task) % tasks * per_task;
    const int64_t last = std::min<int64_t>(first + per_task, new_tokens(lengths, b));
    for (int64_t t = first; t < last; ++t) preparation.token(b, t);
  };
  parallel_for(context, static_cast<size_t>(call.batch * tasks), body);
  return packed_tokens(rows, call, SKV_FLOAT);
}

}  // namespace skv::ort
