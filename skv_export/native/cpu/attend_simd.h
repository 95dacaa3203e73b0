// Owns the fast attention, written in the vocabulary of a Simd (simd_*.h), and included once by each unit that has one.
// Everything is in an unnamed namespace: no code is shared between instruction sets.
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
constexpr int kMaxGroups = kMaxDim / 32;
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

// exp(x) for x <= 88, to about 2e-7 of itself; below -87 it is close to 0.
F exp_ps(F x) {
  const F log2e = Simd::set(1.44269504f);
  x = Simd::max(x, Simd::set(-87.0f));
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
  void index_groups();
  bool spreads(int p) const;
  template <int kWidth, int kNibble>
  void sum_fields(const uint8_t* tile, int p);
  template <int kWidth, int kNibble, int kFirst, bool kSpread>
  void sum_all_rows(const uint8_t* tile, int p);
  template <int kRows, int kWidth, int kNibble, int kFirst, bool kSpread>
  void sum_plane(const uint8_t* tile, int p, int row);
  void sum_rows(const Run& run);

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

  // Weights as bytes: [row][group][high, low][token], and where a vector spans groups also [row][high,
  // low][quad][group].
  alignas(64) int8_t weights_[kMaxQueryRows][kMaxGroups][2][kMaxRunTokens];
  alignas(64) int8_t spread_[kMaxQueryRows][2][kMaxRunTokens / 4][(kMaxGroups + kLanes) * 4];
  alignas(64) int32_t lane_group_[2][kMaxDim + kLanes];  // group of each byte position, less that of its vector's first
  alignas(64) float weight_step_[kMaxQueryRows][kMaxGroups + kLanes];
  F weight_sums_[kMaxQueryRows][kMaxGroups];  // of rounded weights, over all tiles; a lane's share each
  F tile_total_[kMaxQueryRows];               // of the tile's probabilities, likewise
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

// Keys.

// Rounds channels [first, first + count) of a query to 16 bits and lays them out for every plane; returns the step, and
// in *sum the sum of the rounded query, a lane's share each.
float Attend::quantize_query(int m, const float* query, int first, int count, F* sum) {
  F high = Simd::set(0);
  for (int c = 0; c < count; c += kLanes) high = Simd::max(high, Simd::abs(Simd::load(query + c)));
  const float largest = Simd::largest(high), factor = largest > 0 ? kSplitRange / largest : 0;
  I total = Simd::zero();
  for (int c = 0; c < count; c += 32) {
    Simd::Bytes16 bytes[2][2];  // [high, low][half]
    for (int half = 0; half < 2; half++) {
      Simd::split16(query + c + 16 * half, factor, &bytes[0][half], &bytes[1][half], &total);
    }
    for (int p = 0; p < k_.num_planes; p++) {
      for (int h = 0; h < 2; h++) {
        int8_t* to = query_[p][m][h] + first + c;
        Simd::Bytes16 a = bytes[h][0], b = bytes[h][1];
        switch (k_.planes[p].width) {
          case 4:
            a = Simd::arrange<4>(a), b = Simd::arrange<4>(b);
            break;
          case 2:
            a = Simd::arrange<2>(a), b = Simd::arrange<2>(b);
            break;
          case 1:
            Simd::arrange32(&a, &b);
            break;
          default:
            break;
        }
        Simd::store16(to, a);
        Simd::store16(to + 16, b);
      }
    }
  }
  const float step = largest / kSplitRange;
  *sum = Simd::to_float(total) * Simd::set(step);
  return step;
}

// Scales per token and group: score = sum over groups of scale * (step * dot - middle * sum of the query).
void Attend::quantize_queries_by_group() {
  const float middle = static_cast<float>((1 << k_.bits) - 1) / 2;
  for (int m = 0; m < rows_; m++) {
    for (int g = 0; g < dim_ / k_.group_size; g++) {
      const int first = g * k_.group_size;
      F sum;
      query_step_[m][g] =
          quantize_query(m, job_.queries + static_cast<int64_t>(m) * dim_ + first, first, k_.group_size, &sum);
      query_base_[m][g] = -middle * Simd::sum(sum);
    }
  }
}

// Scales per channel: score = sum of (query * scale) * code + sum of query * offset. Two or more sections of channels
// have a step each: a few channels are loud, and the quiet ones would be rounded to their step. The rounding of query *
// scale is made up for at the middle code: its sum enters the constant exactly.
void Attend::fold_channel_scales(const uint8_t* tile) {
  const F middle = Simd::set(static_cast<float>((1 << k_.bits) - 1) / 2);
  const uint8_t *scales = tile + k_.parameters, *offsets = scales + 2 * dim_;
  for (int m = 0; m < rows_; m++) {
    const float* query = job_.queries + static_cast<int64_t>(m) * dim_;
    for (int s = 0; s < dim_ / section_; s++) {
      F constant = Simd::set(0), sum;
      for (int d = s * section_; d < (s + 1) * section_; d += kLanes) {
        const F q = Simd::load(query + d), folded = q * Simd::load_half(scales + 2 * d);
        constant = Simd::fma(q, Simd::load_half(offsets + 2 * d), constant);
        constant = Simd::fma(folded, middle, constant);
        Simd::store(work_ + d, folded);
      }
      query_step_[m][s] = quantize_query(m, work_ + s * section_, s * section_, section_, &sum);
      query_base_[m][s] = Simd::sum(constant - middle * sum);
    }
  }
}

// Adds a plane's part of one section to the scores; `begin`: the section's first plane, which brings the constant.
template <int kRows, int kVectors, int kWidth, int kNibble>
void Attend::score_plane(const uint8_t* tile, int p, int section, bool begin) {
  constexpr int kBits = kWidth == 8 && !Simd::kByteDot ? 4 : kWidth;  // taken from a byte at a time
  constexpr int kFields = 8 / kWidth;
  const int tokens = k_.tile_tokens, words = section_ * kWidth / 32, first = section * section_;
  const uint8_t* plane = tile + k_.planes[p].offset + static_cast<int64_t>(section) * words * tokens * 4;
  const int8_t* query = query_[p][0][0] + first;
  const float weight = static_cast<float>(1 << (k_.planes[p].shift + 4 * kNibble));
  Ahead ahead = ahead_;
  for (int t = 0; t < tokens; t += kVectors * kLanes) {
    I high[kRows][kVectors], low[kRows][kVectors];
    for (int m = 0; m < kRows; m++) {
      for (int v = 0; v < kVectors; v++) high[m][v] = low[m][v] = Simd::zero();
    }
    for (int w = 0; w < words; w++) {
      ahead.step();
      const uint8_t* at = plane + (static_cast<int64_t>(w) * tokens + t) * 4;
      I word[kVectors];
      for (int v = 0; v < kVectors; v++) word[v] = Simd::load_bytes(at + v * kLanes * 4);
      const int8_t* q = query + w * kFields * 4;
      const auto add = [&](auto field) {
        constexpr int kField = decltype(field)::value;
        I codes[kVectors];
        for (int v = 0; v < kVectors; v++) codes[v] = Simd::field<kField * kWidth + 4 * kNibble, kBits>(word[v]);
        for (int m = 0; m < kRows; m++) {
          const I h = Simd::repeat4(q + m * 2 * kQueryStride + kField * 4);
          const I l = Simd::repeat4(q + (m * 2 + 1) * kQueryStride + kField * 4);
          for (int v = 0; v < kVectors; v++) {
            high[m][v] = Simd::dot(high[m][v], codes[v], h);
            low[m][v] = Simd::dot(low[m][v], codes[v], l);
          }
        }
      };
      for_constants<0, kFields>(add);
    }
    for (int m = 0; m < kRows; m++) {
      const F factor = Simd::set(query_step_[m][section] * weight);
      const F base = Simd::set(begin ? query_base_[m][section] : 0.0f);
      for (int v = 0; v < kVectors; v++) {
        float* score = scores_[m] + t + v * kLanes;
        const F dot = Simd::fma(Simd::to_float(high[m][v]), Simd::set(256.0f), Simd::to_float(low[m][v]));
        F part = Simd::fma(dot, factor, base);
        if (!k_.channel) {
          part = part * Simd::load_half(tile + k_.parameters + 2 * (section * tokens + t + v * kLanes));
        }
        Simd::store(score, begin && section == 0 ? part : Simd::load(score) + part);
      }
    }
  }
  ahead_ = ahead;
}

template <int kRows, int kVectors>
void Attend::score_section(const uint8_t* tile, int section) {
  for (int p = 0; p < k_.num_planes; p++) {
    switch (k_.planes[p].width) {
      case 1:
        score_plane<kRows, kVectors, 1, 0>(tile, p, section, p == 0);
        break;
      case 2:
        score_plane<kRows, kVectors, 2, 0>(tile, p, section, p == 0);
        break;
      case 4:
        score_plane<kRows, kVectors, 4, 0>(tile, p, section, p == 0);
        break;
      default:
        score_plane<kRows, kVectors, 8, 0>(tile, p, section, p == 0);
        if constexpr (!Simd::kByteDot) score_plane<kRows, kVectors, 8, 1>(tile, p, section, false);
    }
  }
}

template <int kRows>
void Attend::score_sections(const uint8_t* tile) {
  constexpr int kFit = Simd::kAccumulators / (2 * kRows), kVectors = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  for (int section = 0; section < dim_ / section_; section++) {
    if (k_.tile_tokens % (kVectors * kLanes) == 0)
      score_section<kRows, kVectors>(tile, section);
    else
      score_section<kRows, 32 / kLanes>(tile, section);
  }
}

void Attend::score_tile(const uint8_t* tile) {
  if (k_.channel) fold_channel_scales(tile);
  switch (rows_) {
    case 1:
      return score_sections<1>(tile);
    case 2:
      return score_sections<2>(tile);
    case 3:
      return score_sections<3>(tile);
    default:
      return score_sections<4>(tile);
  }
}

void Attend::score_rows(const Run& run) {
  for (int first = 0; first < run.count; first += kStrip) {
    const int count = smaller(kStrip, run.count - first);
    const float* keys = strip(k_, run.key, run.key_form, first, count);
    for (int t = 0; t < count; t++) {
      const float* key = keys + static_cast<int64_t>(t) * dim_;
      F sums[kMaxQueryRows];
      for (int m = 0; m < kMaxQueryRows; m++) sums[m] = Simd::set(0);
      for (int d = 0; d < dim_; d += kLanes) {
        const F x = Simd::load(key + d);
        for (int m = 0; m < rows_; m++) {
          sums[m] = Simd::fma(x, Simd::load(job_.queries + static_cast<int64_t>(m) * dim_ + d), sums[m]);
        }
      }
      for (int m = 0; m < rows_; m++) scores_[m][first + t] = Simd::sum(sums[m]);
    }
  }
}

// Softmax.

// cap * tanh(score / cap), tanh(y) = 1 - 2 / (exp(2 y) + 1).
void Attend::cap(float* scores, int count) const {
  const F cap = Simd::set(job_.softcap), one = Simd::set(1), two = Simd::set(2), far = Simd::set(10);
  for (int t = 0; t < count; t += kLanes) {
    F y = Simd::load(scores + t) / cap;
    y = Simd::max(Simd::min(y, far), Simd::set(0) - far);
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

// Values.

// Whether a vector of byte positions of plane p holds channels of more than one group.
bool Attend::spreads(int p) const { return v_.group_size % (kLanes * 8 / v_.planes[p].width) != 0 && !v_.channel; }

void Attend::index_groups() {
  for (int p = 0; p < v_.num_planes; p++) {
    if (!spreads(p)) continue;
    const int fields = 8 / v_.planes[p].width;
    for (int k = 0; k < dim_ / fields + kLanes; k++) {
      lane_group_[p][k] = k * fields / v_.group_size - k / kLanes * kLanes * fields / v_.group_size;
    }
  }
}

// Weights of the tile's tokens: probability, times the scale where it is the token's.
void Attend::weigh(const uint8_t* tile) {
  const int tokens = v_.tile_tokens;
  bool spread = false;
  for (int p = 0; p < v_.num_planes; p++) spread |= spreads(p);
  for (int m = 0; m < rows_; m++) {
    for (int g = 0; g < num_groups_; g++) {
      const uint8_t* scales = tile + v_.parameters + 2 * g * tokens;
      F high = Simd::set(0);
      for (int t = 0; t < tokens; t += kLanes) {
        F weight = Simd::load(scores_[m] + t);
        if (!v_.channel) weight = weight * Simd::load_half(scales + 2 * t);
        high = Simd::max(high, Simd::abs(weight));
        Simd::store(work_ + t, weight);
      }
      const float largest = Simd::largest(high), factor = largest > 0 ? kSplitRange / largest : 0;
      I total = Simd::zero();
      for (int t = 0; t < tokens; t += 16) {
        Simd::Bytes16 bytes[2];
        Simd::split16(work_ + t, factor, &bytes[0], &bytes[1], &total);
        for (int h = 0; h < 2; h++) Simd::store16(weights_[m][g][h] + t, bytes[h]);
      }
      weight_step_[m][g] = largest / kSplitRange;
      const F sum = Simd::to_float(total) * Simd::set(weight_step_[m][g]);
      weight_sums_[m][g] = weight_sums_[m][g] + sum;
      if (v_.channel) {
        // The rounding of the weights is made up for at the middle code.
        value_total_[m] = Simd::sum(tile_total_[m]);
        value_rest_[m] = static_cast<float>((1 << v_.bits) - 1) / 2 * Simd::sum(tile_total_[m] - sum);
      }
      if (!spread) continue;
      for (int h = 0; h < 2; h++) {
        for (int quad = 0; quad < tokens / 4; quad++)
          memcpy(spread_[m][h][quad] + 4 * g, weights_[m][g][h] + 4 * quad, 4);
      }
    }
  }
}

void Attend::load_channel_parameters(const uint8_t* tile) {
  alignas(64) float offsets[kMaxDim];
  load_row(SKV_FLOAT16, tile + v_.parameters, work_, dim_);
  load_row(SKV_FLOAT16, tile + v_.parameters + 2 * dim_, offsets, dim_);
  for (int p = 0; p < v_.num_planes; p++) {
    const int fields = 8 / v_.planes[p].width, positions = dim_ / fields;
    for (int k = 0; k < positions; k++) {
      const int at = k / kLanes * kLanes * fields + k % kLanes;
      for (int f = 0; f < fields; f++) {
        value_scale_[p][at + f * kLanes] = work_[k * fields + f];
        if (p == 0) value_offset_[at + f * kLanes] = offsets[k * fields + f];
      }
    }
  }
}

// Adds fields [kFirst, kFirst + some) of a plane for kRows query rows: as many as there are registers for.
template <int kRows, int kWidth, int kNibble, int kFirst, bool kSpread>
void Attend::sum_plane(const uint8_t* tile, int p, int row) {
  constexpr int kBits = kWidth == 8 && !Simd::kByteDot ? 4 : kWidth;  // taken from a byte at a time
  constexpr int kFields = 8 / kWidth, kSome = smaller(kFields, Simd::kAccumulators / 2);
  const int positions = dim_ / kFields, quads = v_.tile_tokens / 4;
  const uint8_t* plane = tile + v_.planes[p].offset;
  const bool begin = p == 0 && kNibble == 0;
  const float weight = static_cast<float>(1 << (v_.planes[p].shift + 4 * kNibble));
  Ahead ahead = ahead_;
  for (int u = 0; u < positions; u += kLanes) {
    const int group = u * kFields / v_.group_size;
    const int32_t* lane_group = lane_group_[p] + u;
    I high[kRows][kSome], low[kRows][kSome];
    for (int m = 0; m < kRows; m++) {
      for (int f = 0; f < kSome; f++) high[m][f] = low[m][f] = Simd::zero();
    }
    for (int quad = 0; quad < quads; quad++) {
      ahead.step();
      // The last vector of a plane may reach past it, into what follows in the tile; those lanes are not used.
      const I bytes = Simd::load_bytes(plane + (static_cast<int64_t>(quad) * positions + u) * 4);
      I h[kRows], l[kRows];
      for (int m = 0; m < kRows; m++) {
        if constexpr (kSpread) {
          h[m] = Simd::permute(spread_[row + m][0][quad] + 4 * group, lane_group);
          l[m] = Simd::permute(spread_[row + m][1][quad] + 4 * group, lane_group);
        } else {
          h[m] = Simd::repeat4(weights_[row + m][group][0] + 4 * quad);
          l[m] = Simd::repeat4(weights_[row + m][group][1] + 4 * quad);
        }
      }
      const auto add = [&](auto field) {
        constexpr int kField = decltype(field)::value, kAt = kField - kFirst;
        const I codes = Simd::field<kField * kWidth + 4 * kNibble, kBits>(bytes);
        for (int m = 0; m < kRows; m++) {
          high[m][kAt] = Simd::dot(high[m][kAt], codes, h[m]);
          low[m][kAt] = Simd::dot(low[m][kAt], codes, l[m]);
        }
      };
      for_constants<kFirst, kFirst + kSome>(add);
    }
    for (int m = 0; m < kRows; m++) {
      F step = Simd::set(weight_step_[row + m][group]);
      if constexpr (kSpread) step = Simd::as_float(Simd::permute(weight_step_[row + m] + group, lane_group));
      step = step * Simd::set(weight);
      for (int f = 0; f < kSome; f++) {
        const int at = (u / kLanes * kFields + kFirst + f) * kLanes;
        float* sums = sums_[p][row + m] + at;
        const F dot = Simd::fma(Simd::to_float(high[m][f]), Simd::set(256.0f), Simd::to_float(low[m][f]));
        if (!v_.channel) {
          Simd::store(sums, Simd::fma(dot, step, Simd::load(sums)));
          continue;
        }
        const F part = Simd::fma(dot, step, Simd::set(begin ? value_rest_[row + m] : 0.0f));
        F sum = Simd::fma(part, Simd::load(value_scale_[p] + at), Simd::load(sums));
        if (begin) sum = Simd::fma(Simd::set(value_total_[row + m]), Simd::load(value_offset_ + at), sum);
        Simd::store(sums, sum);
      }
    }
  }
  ahead_ = ahead;
}

template <int kWidth, int kNibble, int kFirst, bool kSpread>
void Attend::sum_all_rows(const uint8_t* tile, int p) {
  constexpr int kSome = smaller(8 / kWidth, Simd::kAccumulators / 2);
  constexpr int kMost = smaller(kMaxQueryRows, Simd::kAccumulators / (2 * kSome));
  int row = 0;
  for (; row + kMost <= rows_; row += kMost) sum_plane<kMost, kWidth, kNibble, kFirst, kSpread>(tile, p, row);
  if constexpr (kMost == 4) {
    if (rows_ - row == 3) return sum_plane<3, kWidth, kNibble, kFirst, kSpread>(tile, p, row);
    if (rows_ - row == 2) return sum_plane<2, kWidth, kNibble, kFirst, kSpread>(tile, p, row);
  }
  if constexpr (kMost > 1) {
    if (rows_ - row == 1) sum_plane<1, kWidth, kNibble, kFirst, kSpread>(tile, p, row);
  }
}

template <int kWidth, int kNibble>
void Attend::sum_fields(const uint8_t* tile, int p) {
  constexpr int kFields = 8 / kWidth, kSome = smaller(kFields, Simd::kAccumulators / 2);
  if (spreads(p)) {
    sum_all_rows<kWidth, kNibble, 0, true>(tile, p);
    if constexpr (kSome < kFields) sum_all_rows<kWidth, kNibble, kSome, true>(tile, p);
  } else {
    sum_all_rows<kWidth, kNibble, 0, false>(tile, p);
    if constexpr (kSome < kFields) sum_all_rows<kWidth, kNibble, kSome, false>(tile, p);
  }
}

void Attend::sum_tile(const uint8_t* tile) {
  weigh(tile);
  if (v_.channel) load_channel_parameters(tile);
  for (int p = 0; p < v_.num_planes; p++) {
    switch (v_.planes[p].width) {
      case 1:
        sum_fields<1, 0>(tile, p);
        break;
      case 2:
        sum_fields<2, 0>(tile, p);
        break;
      case 4:
        sum_fields<4, 0>(tile, p);
        break;
      default:
        sum_fields<8, 0>(tile, p);
        if constexpr (!Simd::kByteDot) sum_fields<8, 1>(tile, p);
    }
  }
}

void Attend::sum_rows(const Run& run) {
  for (int first = 0; first < run.count; first += kStrip) {
    const int count = smaller(kStrip, run.count - first);
    const float* values = strip(v_, run.value, run.value_form, first, count);
    for (int d = 0; d < dim_; d += kLanes) {
      F sums[kMaxQueryRows];
      for (int m = 0; m < rows_; m++) sums[m] = Simd::load(sums_[0][m] + d);
      for (int t = 0; t < count; t++) {
        const F x = Simd::load(values + static_cast<int64_t>(t) * dim_ + d);
        for (int m = 0; m < rows_; m++) sums[m] = Simd::fma(x, Simd::set(scores_[m][first + t]), sums[m]);
      }
      for (int m = 0; m < rows_; m++) Simd::store(sums_[0][m] + d, sums[m]);
    }
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
  }
}

void attend(const AttendJob* job) { Attend(*job).run(); }

}  // namespace
