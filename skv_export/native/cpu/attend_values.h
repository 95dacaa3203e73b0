// Weighted sums of the fast attention: probabilities times the values of a run. A part of attend_simd.h.
#pragma once
#include "cpu/attend_simd.h"

namespace {

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
  load_channels(v_, tile, work_, offsets);
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

// A mean per channel and tile counts once for each token, by its probability.
void Attend::sum_means(const uint8_t* tile) {
  load_means(v_, tile, work_);
  for (int m = 0; m < rows_; m++) {
    const F total = Simd::set(Simd::sum(tile_total_[m]));
    for (int d = 0; d < dim_; d += kLanes) {
      float* sums = value_means_[m] + d;
      Simd::store(sums, Simd::fma(total, Simd::load(work_ + d), Simd::load(sums)));
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
  if (v_.means) sum_means(tile);
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

// As sum_rows, for values that need not be finite: what a row does not see has a weight of about 0, which would not
// hide them.
void Attend::sum_seen_rows(const Run& run) {
  for (int first = 0; first < run.count; first += kStrip) {
    const int count = smaller(kStrip, run.count - first);
    const float* values = strip(v_, run.value, run.value_form, first, count);
    for (int m = 0; m < rows_; m++) {
      for (int t = 0; t < count; t++) {
        const int64_t position = run.position + first + t;
        if (position < job_.first[m] || position > job_.last[m]) continue;
        const float* value = values + static_cast<int64_t>(t) * dim_;
        for (int d = 0; d < dim_; d++) sums_[0][m][d] += scores_[m][first + t] * value[d];
      }
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

}  // namespace
