// Scores of the fast attention: queries against the keys of a run. A part of attend_simd.h.
#pragma once
#include "cpu/attend_simd.h"

namespace {

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
  load_channels(k_, tile, key_scale_, key_offset_);
  for (int m = 0; m < rows_; m++) {
    const float* query = job_.queries + static_cast<int64_t>(m) * dim_;
    for (int s = 0; s < dim_ / section_; s++) {
      F constant = Simd::set(0), sum;
      for (int d = s * section_; d < (s + 1) * section_; d += kLanes) {
        const F q = Simd::load(query + d), folded = q * Simd::load(key_scale_ + d);
        constant = Simd::fma(q, Simd::load(key_offset_ + d), constant);
        constant = Simd::fma(folded, middle, constant);
        Simd::store(work_ + d, folded);
      }
      query_step_[m][s] = quantize_query(m, work_ + s * section_, s * section_, section_, &sum);
      query_base_[m][s] = Simd::sum(constant - middle * sum);
    }
  }
}

// A mean per channel and tile: score = what the scales per token give + query * mean.
void Attend::score_means(const uint8_t* tile) {
  load_means(k_, tile, work_);
  for (int m = 0; m < rows_; m++) {
    const float* query = job_.queries + static_cast<int64_t>(m) * dim_;
    F sum = Simd::set(0);
    for (int d = 0; d < dim_; d += kLanes) sum = Simd::fma(Simd::load(query + d), Simd::load(work_ + d), sum);
    query_mean_[m] = Simd::sum(sum);
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
        Simd::store(score, part + (begin && section == 0 ? Simd::set(query_mean_[m]) : Simd::load(score)));
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
    if constexpr (kVectors * kLanes > 32) {
      if (k_.tile_tokens % (kVectors * kLanes) != 0) {
        score_section<kRows, 32 / kLanes>(tile, section);
        continue;
      }
    }
    score_section<kRows, kVectors>(tile, section);
  }
}

void Attend::score_tile(const uint8_t* tile) {
  if (k_.channel) fold_channel_scales(tile);
  if (k_.means) score_means(tile);
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

// Queries in the basis of the tiles. What becomes of them is held to a tolerance, so products and sums are fused.

// kRows rows [kRows][n] times kVectors registers of a matrix' columns.
template <int kRows, int kVectors>
void turn_columns(const float* columns, int n, const float* rows, float* turned) {
  F sums[kRows][kVectors];
  for (auto& row : sums) {
    for (F& sum : row) sum = Simd::set(0);
  }
  for (int j = 0; j < n; j++) {
    F factors[kVectors];
    for (int v = 0; v < kVectors; v++) factors[v] = Simd::load(columns + int64_t{j} * n + v * kLanes);
    for (int r = 0; r < kRows; r++) {
      const F x = Simd::set(rows[r * n + j]);
      for (int v = 0; v < kVectors; v++) sums[r][v] = Simd::fma(factors[v], x, sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; r++) {
    for (int v = 0; v < kVectors; v++) Simd::store(turned + r * n + v * kLanes, sums[r][v]);
  }
}

template <int kRows>
void turn_rows(const float* matrix, int n, const float* rows, float* turned) {
  constexpr int kWide = Simd::kAccumulators / kMaxQueryRows, kNarrow = 32 / kLanes;  // n is a multiple of 32
  int i = 0;
  for (; i + kWide * kLanes <= n; i += kWide * kLanes) turn_columns<kRows, kWide>(matrix + i, n, rows, turned + i);
  if (i < n) turn_columns<kRows, smaller(kNarrow, kWide)>(matrix + i, n, rows, turned + i);
}

// The matrix is read once for the query heads of a group, up to kMaxQueryRows of them.
void turn_queries(const float* matrix, int32_t n, const float* rows, int64_t count, float* turned) {
  for (; count >= kMaxQueryRows; count -= kMaxQueryRows, rows += kMaxQueryRows * n, turned += kMaxQueryRows * n) {
    turn_rows<kMaxQueryRows>(matrix, n, rows, turned);
  }
  if (count == 3) turn_rows<3>(matrix, n, rows, turned);
  if (count == 2) turn_rows<2>(matrix, n, rows, turned);
  if (count == 1) turn_rows<1>(matrix, n, rows, turned);
}

}  // namespace
