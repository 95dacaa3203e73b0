// The fast attention (with attend_keys.h and attend_values.h), written with the operations of a Simd class (simd_*.h),
// and included once by each unit that has one. Everything is in an unnamed namespace: no code is shared between
// instruction sets.
//
// Tiles are never unpacked to floats. A key's code enters an integer dot product with the query as two planes of int8
// (16 bits); scales per channel are folded into the query once per tile, scales per token applied to the sums. Values
// are summed over tokens by integer dot products with weights = probability * scale, again as two planes of int8. Codes
// are unsigned, their middle is subtracted through the sums of the rounded queries and weights. Rows in full precision
// go through float32.
#pragma once
#include <math.h>
#include <string.h>

#include "cpu/isa.h"
#include "cpu/tile_codec.h"

namespace {

using skv::AttendJob;
using skv::kCodes;
using skv::kMaxDim;
using skv::kMaxQueryRows;
using skv::kMaxRunTokens;
using skv::Run;
using F = Simd::F;
using I = Simd::I;

constexpr int kLanes = Simd::kLanes;
constexpr int kMaxGroups = kMaxDim / skv::kMinGroup;
constexpr int kQueryStride = kMaxDim + 64;  // not a power of two: rows do not meet in one set of the cache
constexpr int kSumStride = kMaxDim + 8 * kLanes;
constexpr float kSplitRange = 32512.0f;  // 127 * 256: high and low bytes of it fit int8

// Calls body(Index<i>) for i in [kFirst, kEnd), so that i is a constant in it.
template <int kIndex>
struct Index {
  static constexpr int value = kIndex;
};
template <int kFirst, int kEnd, class Body>
void for_constants(Body& body) {
  if constexpr (kFirst < kEnd) {
    body(Index<kFirst>());
    for_constants<kFirst + 1, kEnd>(body);
  }
}

constexpr int smaller(int a, int b) { return a < b ? a : b; }

// exp(x) for x <= 88, to about 2e-7 of itself; below -87 it is close to 0. Not-a-number stays one: of two operands, of
// which one is not a number, x86's max and min give the second.
F exp_ps(F x) {
  const F log2e = Simd::set(1.44269504f);
  x = Simd::max(Simd::set(-87.0f), x);
  const F exponent = Simd::round(x * log2e), f = Simd::fma(x, log2e, Simd::set(0.0f) - exponent);
  F p = Simd::set(1.5353362e-4f);  // 2^f on [-1/2, 1/2], a minimax polynomial
  p = Simd::fma(p, f, Simd::set(1.3398874e-3f));
  p = Simd::fma(p, f, Simd::set(9.6184373e-3f));
  p = Simd::fma(p, f, Simd::set(5.5503324e-2f));
  p = Simd::fma(p, f, Simd::set(2.4022648e-1f));
  p = Simd::fma(p, f, Simd::set(6.9314718e-1f));
  p = Simd::fma(p, f, Simd::set(1.0f));
  return Simd::scale(p, exponent);
}

// Whether tiles of this shape can be read without unpacking: groups of whole 32-bit words in every plane.
bool fast_shape(const TileShape& s) { return s.bits != 16 && s.group_size % 32 == 0; }

class Attend {
 public:
  explicit Attend(const AttendJob& job)
      : job_(job),
        k_(*job.key_shape),
        v_(*job.value_shape),
        rows_(job.rows),
        dim_(k_.dim),
        num_groups_(v_.dim / v_.group_size),
        section_(k_.channel ? (dim_ % 64 == 0 && dim_ <= 256 ? dim_ / 2 : 32) : k_.group_size) {}

  void run() {
    const bool key_codes = job_.runs[0].key_form == kCodes && fast_shape(k_);
    const bool value_codes = job_.runs[0].value_form == kCodes && fast_shape(v_);
    for (int m = 0; m < rows_; m++) {
      peak_[m] = -INFINITY;
      total_[m] = Simd::set(0);
      for (int p = 0; p < 2; p++) memset(sums_[p][m], 0, sizeof(float) * (dim_ + 8 * kLanes));
      for (int g = 0; g < num_groups_; g++) weight_sums_[m][g] = Simd::set(0);
      query_mean_[m] = 0;
      if (v_.means) memset(value_means_[m], 0, sizeof(float) * dim_);
    }
    if (value_codes) index_groups();
    if (key_codes && !k_.channel) quantize_queries_by_group();
    for (int r = 0; r < job_.num_runs; r++) {
      const Run& run = job_.runs[r];
      const Run& next = job_.runs[smaller(r + 1, job_.num_runs - 1)];
      if (key_codes) {
        ahead_.at = static_cast<const uint8_t*>(next.key);
        ahead_.end = ahead_.at + k_.tile_bytes;
        score_tile(static_cast<const uint8_t*>(run.key));
      } else {
        score_rows(run);
      }
      softmax(run);
      if (value_codes) {
        ahead_.at = static_cast<const uint8_t*>(next.value);
        ahead_.end = ahead_.at + v_.tile_bytes;
        sum_tile(static_cast<const uint8_t*>(run.value));
      } else if (job_.any_value) {
        sum_seen_rows(run);
      } else {
        sum_rows(run);
      }
    }
    finish(value_codes);
  }

 private:
  // Part of the next tile, asked for while this one is worked on: its words are read in strides, which processors do
  // not foresee, and all lines at once would wait for each other.
  struct Ahead {
    const uint8_t* at = nullptr;
    const uint8_t* end = nullptr;

    void step() {
      if (at >= end) return;
      __builtin_prefetch(at);
      __builtin_prefetch(at + 64);
      at += 128;
    }
  };

  // Keys.

  float quantize_query(int m, const float* query, int first, int count, F* sum);
  void quantize_queries_by_group();
  void fold_channel_scales(const uint8_t* tile);
  void score_means(const uint8_t* tile);
  void score_tile(const uint8_t* tile);
  template <int kRows, int kVectors, int kWidth, int kNibble>
  void score_plane(const uint8_t* tile, int p, int section, bool begin);
  template <int kRows>
  void score_sections(const uint8_t* tile);
  template <int kRows, int kVectors>
  void score_section(const uint8_t* tile, int section);
  void score_rows(const Run& run);

  // Softmax.

  void softmax(const Run& run);
  void cap(float* scores, int count) const;
  void shrink(int m, float factor);

  // Values.

  void sum_tile(const uint8_t* tile);
  void weigh(const uint8_t* tile);
  void load_channel_parameters(const uint8_t* tile);
  void sum_means(const uint8_t* tile);
  void index_groups();
  bool spreads(int p) const;
  template <int kWidth, int kNibble>
  void sum_fields(const uint8_t* tile, int p);
  template <int kWidth, int kNibble, int kFirst, bool kSpread>
  void sum_all_rows(const uint8_t* tile, int p);
  template <int kRows, int kWidth, int kNibble, int kFirst, bool kSpread>
  void sum_plane(const uint8_t* tile, int p, int row);
  void sum_rows(const Run& run);
  void sum_seen_rows(const Run& run);

  void finish(bool value_codes);
  const float* strip(const TileShape& shape, const void* data, int form, int first, int count);

  const AttendJob& job_;
  const TileShape& k_;
  const TileShape& v_;
  const int rows_, dim_;
  const int num_groups_;  // of values
  const int section_;     // channels of a query that share a step; with scales per token, a group
  Ahead ahead_;

  float peak_[kMaxQueryRows];
  F total_[kMaxQueryRows];                                  // a lane's share each
  alignas(64) float scores_[kMaxQueryRows][kMaxRunTokens];  // then probabilities, relative to the peak
  // Sums of weighted values: by channel, or in the order in which a plane's sums come: (byte position / kLanes, field,
  // byte position % kLanes).
  alignas(64) float sums_[2][kMaxQueryRows][kSumStride];

  // Queries as bytes, in the order of each plane: [plane][row][high, low].
  alignas(64) int8_t query_[2][kMaxQueryRows][2][kQueryStride];
  float query_step_[kMaxQueryRows][kMaxGroups];  // of each section: a group, or with scales per channel all channels
  float query_base_[kMaxQueryRows][kMaxGroups];  // what is added to step * dot
  alignas(64) float key_scale_[kMaxDim], key_offset_[kMaxDim];  // of a tile's channels
  float query_mean_[kMaxQueryRows];                             // query * the tile's means, the same for all its tokens

  // Weights as bytes: [row][group][high, low][token], and where a vector spans groups also [row][high,
  // low][quad][group].
  alignas(64) int8_t weights_[kMaxQueryRows][kMaxGroups][2][kMaxRunTokens];
  alignas(64) int8_t spread_[kMaxQueryRows][2][kMaxRunTokens / 4][(kMaxGroups + kLanes) * 4];
  alignas(64) int32_t lane_group_[2][kMaxDim + kLanes];  // group of each byte position, less that of its vector's first
  alignas(64) float weight_step_[kMaxQueryRows][kMaxGroups + kLanes];
  F weight_sums_[kMaxQueryRows][kMaxGroups];               // of rounded weights, over all tiles; a lane's share each
  F tile_total_[kMaxQueryRows];                            // of the tile's probabilities, likewise
  alignas(64) float value_means_[kMaxQueryRows][kMaxDim];  // sums of probability * mean
  float value_rest_[kMaxQueryRows], value_total_[kMaxQueryRows];  // what a tile adds per scale and per offset
  alignas(64) float value_scale_[2][kSumStride], value_offset_[kSumStride];  // per channel, in a plane's order

  alignas(64) float work_[kMaxDim];
  alignas(64) float strip_[kStrip * kMaxDim];
};

// Tokens [first, first + count) of a run as float rows [count][D].
const float* Attend::strip(const TileShape& shape, const void* data, int form, int first, int count) {
  if (form == kCodes) {
    decode_strip(shape, static_cast<const uint8_t*>(data), first, strip_);
    return strip_;
  }
  const int64_t start = static_cast<int64_t>(first) * dim_;
  if (form == SKV_FLOAT) return static_cast<const float*>(data) + start;
  load_row(form, static_cast<const uint8_t*>(data) + 2 * start, strip_, count * dim_);
  return strip_;
}

// Softmax.

// cap * tanh(score / cap), tanh(y) = 1 - 2 / (exp(2 y) + 1).
void Attend::cap(float* scores, int count) const {
  const F cap = Simd::set(job_.softcap), one = Simd::set(1), two = Simd::set(2), far = Simd::set(10);
  for (int t = 0; t < count; t += kLanes) {
    F y = Simd::load(scores + t) / cap;
    y = Simd::max(Simd::set(0) - far, Simd::min(far, y));
    Simd::store(scores + t, cap * (one - two / (exp_ps(two * y) + one)));
  }
}

// The peak has risen: what has been summed weighs less.
void Attend::shrink(int m, float factor) {
  const F by = Simd::set(factor);
  total_[m] = total_[m] * by;
  for (int p = 0; p < 2; p++) {
    float* sums = sums_[p][m];
    for (int d = 0; d < dim_ + 8 * kLanes; d += kLanes) Simd::store(sums + d, Simd::load(sums + d) * by);
    if (v_.num_planes < 2) break;
  }
  for (int g = 0; g < num_groups_; g++) weight_sums_[m][g] = weight_sums_[m][g] * by;
  for (int d = 0; v_.means && d < dim_; d += kLanes) {
    Simd::store(value_means_[m] + d, Simd::load(value_means_[m] + d) * by);
  }
}

void Attend::softmax(const Run& run) {
  const int padded = (run.count + kLanes - 1) / kLanes * kLanes;
  for (int m = 0; m < rows_; m++) {
    float* scores = scores_[m];
    if (job_.softcap > 0) cap(scores, padded);
    const int64_t from = job_.first[m] - run.position, last = job_.last[m] - run.position;
    if (from > 0 || last < padded - 1 || padded != run.count) {
      for (int t = 0; t < padded; t++) {
        if (t < from || t > last || t >= run.count) scores[t] = -INFINITY;
      }
    }
    F high = Simd::load(scores);
    for (int t = kLanes; t < padded; t += kLanes) high = Simd::max(high, Simd::load(scores + t));
    const float largest = Simd::largest(high);
    if (largest > peak_[m]) {
      if (peak_[m] != -INFINITY) shrink(m, expf(peak_[m] - largest));
      peak_[m] = largest;
    }
    const F peak = Simd::set(peak_[m] == -INFINITY ? 0.0f : peak_[m]);
    F sum = Simd::set(0);
    for (int t = 0; t < padded; t += kLanes) {
      const F p = exp_ps(Simd::load(scores + t) - peak);
      sum = sum + p;
      Simd::store(scores + t, p);
    }
    tile_total_[m] = sum;
    total_[m] = total_[m] + sum;
  }
}

void Attend::finish(bool value_codes) {
  const float middle = static_cast<float>((1 << v_.bits) - 1) / 2;
  for (int m = 0; m < rows_; m++) {
    float* out = job_.partials + static_cast<int64_t>(m) * (dim_ + 2);
    out[0] = peak_[m];
    out[1] = Simd::sum(total_[m]);
    out += 2;
    if (!value_codes) {
      memcpy(out, sums_[0][m], sizeof(float) * dim_);
      continue;
    }
    for (int g = 0; g < num_groups_; g++) {
      const float start = v_.channel ? 0.0f : -middle * Simd::sum(weight_sums_[m][g]);
      for (int i = 0; i < v_.group_size; i++) out[g * v_.group_size + i] = start;
    }
    for (int p = 0; p < v_.num_planes; p++) {
      const int fields = 8 / v_.planes[p].width;
      for (int k = 0; k < dim_ / fields; k++) {
        const float* sums = sums_[p][m] + k / kLanes * kLanes * fields + k % kLanes;
        for (int f = 0; f < fields; f++) out[k * fields + f] += sums[f * kLanes];
      }
    }
    for (int d = 0; v_.means && d < dim_; d++) out[d] += value_means_[m][d];
  }
}

}  // namespace

#include "cpu/attend_keys.h"
#include "cpu/attend_values.h"

namespace {

void attend(const AttendJob* job) { Attend(*job).run(); }

}  // namespace
