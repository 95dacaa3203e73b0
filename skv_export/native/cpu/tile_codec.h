// The quantizer's arithmetic and the packing of tiles (docs/spec.md; spec/quantizer.py is the reference).
//
// Included once by each unit_*.cc and compiled with its instruction set: everything is in an unnamed namespace, nothing
// is shared. Plain loops whose inner index is the token, so that any compiler turns them into vectors of tokens, and
// every operation is a single IEEE one, so that every instruction set gives the same bytes.
#pragma once
#include <stdint.h>
#include <string.h>

#include "cpu/isa.h"
#include "cpu/number_formats.h"
#include "cpu/products.h"
#include "kv_layout.h"

namespace {

using skv::TileShape;

// Tokens handled together: a strip of a tile, channel by channel [D][kStrip].
constexpr int kStrip = 32;

// Butterflies of stride 1, 2, 4, ... and one multiplication, in the reference's order. A block is at least 32 long.
void rotate(float* row, int32_t n, int32_t block) {
  // Within 16 numbers: each and its partner, whose sign is turned for the upper of the two (a - b = -b + a).
  typedef float Vector __attribute__((vector_size(64)));
  const Vector sign1 = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  const Vector sign2 = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  const Vector sign4 = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  const Vector sign8 = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
  for (int start = 0; start < n; start += 16) {
    Vector x;
    memcpy(&x, row + start, sizeof(x));
    x = x * sign1 + __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    x = x * sign2 + __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x = x * sign4 + __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x = x * sign8 + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    memcpy(row + start, &x, sizeof(x));
  }
  for (int stride = 16; stride < block; stride *= 2) {
    for (int start = 0; start < n; start += 2 * stride) {
      float *low = row + start, *high = row + start + stride;
      for (int i = 0; i < stride; i++) {
        const float a = low[i], b = high[i];
        low[i] = a + b;
        high[i] = a - b;
      }
    }
  }
  const float norm = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block)));
  for (int i = 0; i < n; i++) row[i] *= norm;
}

// Quantizing.

// rint(x) clipped to [0, levels]; adding 1.5 * 2^23 rounds to nearest even, as levels are far below 2^22.
float round_clip(float x, float levels) {
  x = x > 0.0f ? x : 0.0f;
  x = x < levels ? x : levels;
  return (x + 12582912.0f) - 12582912.0f;
}

// a / b, and 0 where b is not above 0.
float divide(float a, float b) {
  const float quotient = a / (b > 0.0f ? b : 1.0f);
  return b > 0.0f ? quotient : 0.0f;
}

// Channel by channel [D][kStrip] from the strip's rows [kStrip][D], and back.
void transpose_in(const float* rows, int dim, float* strip) {
  for (int d = 0; d < dim; d++) {
    for (int t = 0; t < kStrip; t++) strip[d * kStrip + t] = rows[static_cast<int64_t>(t) * dim + d];
  }
}

void transpose_out(const float* strip, int dim, float* rows) {
  for (int t = 0; t < kStrip; t++) {
    for (int d = 0; d < dim; d++) rows[static_cast<int64_t>(t) * dim + d] = strip[d * kStrip + t];
  }
}

// Sum over `count` channels [count][kStrip] as a halving tree, count rounded up to a power of two by zeros; overwrites
// x.
void tree_sum(float* x, int count, float* sum) {
  int size = 1;
  while (size < count) size *= 2;
  for (int half = size / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) {
      float* low = x + i * kStrip;
      if (i + half < count) {
        const float* high = x + (i + half) * kStrip;
        for (int t = 0; t < kStrip; t++) low[t] += high[t];
      } else {
        for (int t = 0; t < kStrip; t++) low[t] += 0.0f;  // -0 + 0 is 0: the padding's only trace
      }
    }
    count = count < half ? count : half;
  }
  memcpy(sum, x, sizeof(float) * kStrip);
}

float midrise_step(int bits) {
  constexpr float kSteps[9] = {0, 1.596f, 0.9957f, 0.5860f, 0.3352f, 0.1881f, 0.1041f, 0, 0.0308f};
  return kSteps[bits];
}

// Codes and the unbiased scales [kStrip] of one group [group][kStrip] (reference: _quantize_midrise).
void quantize_midrise(const float* x, int group, int bits, uint8_t* codes, float* scales, float* work) {
  const float levels = static_cast<float>((1 << bits) - 1), middle = levels / 2;
  float energy[kStrip], scale[kStrip], numerator[kStrip], denominator[kStrip];
  float* squares = work + static_cast<int64_t>(group) * kStrip;
  for (int i = 0; i < group * kStrip; i++) work[i] = x[i] * x[i];
  tree_sum(work, group, energy);
  for (int t = 0; t < kStrip; t++) {
    scale[t] = __builtin_sqrtf(energy[t] / static_cast<float>(group)) * midrise_step(bits);
  }
  for (int round = 0; round < 2; round++) {
    for (int i = 0; i < group; i++) {
      for (int t = 0; t < kStrip; t++) {
        const int at = i * kStrip + t;
        const float q = round_clip(divide(x[at], scale[t]) + middle, levels) - middle;
        work[at] = x[at] * q;
        squares[at] = q * q;
      }
    }
    tree_sum(work, group, numerator);
    tree_sum(squares, group, denominator);
    for (int t = 0; t < kStrip; t++) scale[t] = divide(numerator[t], denominator[t]);
  }
  for (int i = 0; i < group; i++) {
    for (int t = 0; t < kStrip; t++) {
      const int at = i * kStrip + t;
      const float code = round_clip(divide(x[at], scale[t]) + middle, levels);
      work[at] = x[at] * (code - middle);
      codes[at] = static_cast<uint8_t>(code);
    }
  }
  tree_sum(work, group, numerator);
  uint8_t empty[kStrip];
  bool any_empty = false;
  for (int t = 0; t < kStrip; t++) {
    scales[t] = divide(energy[t], numerator[t]);
    empty[t] = !(scales[t] > 0.0f);
    any_empty |= empty[t] != 0;
    scales[t] = empty[t] ? 0.0f : scales[t];
  }
  if (!any_empty) return;
  for (int i = 0; i < group; i++) {
    for (int t = 0; t < kStrip; t++) {
      if (empty[t]) codes[i * kStrip + t] = static_cast<uint8_t>(1 << (bits - 1));
    }
  }
}

// Packing a strip's codes [D][kStrip] into its tile, and back (docs/spec.md, Tile).

void pack_strip(const TileShape& s, const uint8_t* codes, int first, uint8_t* tile) {
  for (int p = 0; p < s.num_planes; p++) {
    const int width = s.planes[p].width, shift = s.planes[p].shift, mask = (1 << width) - 1;
    const int per_unit = (s.is_value ? 8 : 32) / width, units = s.dim / per_unit;
    uint8_t* plane = tile + s.planes[p].offset;
    for (int u = 0; u < units; u++) {
      uint32_t words[kStrip] = {};
      for (int i = 0; i < per_unit; i++) {
        const uint8_t* channel = codes + (u * per_unit + i) * kStrip;
        for (int t = 0; t < kStrip; t++) words[t] |= static_cast<uint32_t>(channel[t] >> shift & mask) << (width * i);
      }
      if (!s.is_value) {
        memcpy(plane + (static_cast<int64_t>(u) * s.tile_tokens + first) * 4, words, sizeof(words));
        continue;
      }
      uint8_t bytes[kStrip];
      for (int t = 0; t < kStrip; t++) bytes[t] = static_cast<uint8_t>(words[t]);
      for (int t = 0; t < kStrip; t += 4) {
        memcpy(plane + (static_cast<int64_t>((first + t) / 4) * units + u) * 4, bytes + t, 4);
      }
    }
  }
}

void unpack_strip(const TileShape& s, const uint8_t* tile, int first, uint8_t* codes) {
  memset(codes, 0, static_cast<size_t>(s.dim) * kStrip);
  for (int p = 0; p < s.num_planes; p++) {
    const int width = s.planes[p].width, shift = s.planes[p].shift, mask = (1 << width) - 1;
    const int per_unit = (s.is_value ? 8 : 32) / width, units = s.dim / per_unit;
    const uint8_t* plane = tile + s.planes[p].offset;
    for (int u = 0; u < units; u++) {
      uint32_t words[kStrip];
      if (s.is_value) {
        uint8_t bytes[kStrip];
        for (int t = 0; t < kStrip; t += 4) {
          memcpy(bytes + t, plane + (static_cast<int64_t>((first + t) / 4) * units + u) * 4, 4);
        }
        for (int t = 0; t < kStrip; t++) words[t] = bytes[t];
      } else {
        memcpy(words, plane + (static_cast<int64_t>(u) * s.tile_tokens + first) * 4, sizeof(words));
      }
      for (int i = 0; i < per_unit; i++) {
        uint8_t* channel = codes + (u * per_unit + i) * kStrip;
        for (int t = 0; t < kStrip; t++) {
          channel[t] |= static_cast<uint8_t>((words[t] >> (width * i) & static_cast<uint32_t>(mask)) << shift);
        }
      }
    }
  }
}

// Tiles.

// Numbers in 8 bits as they are read back: code * unit, a bfloat16 unit for each 32 channels.
template <class Code>
void load_byte_parameters(const uint8_t* codes, const uint8_t* units, int dim, float* out) {
  for (int first = 0; first < dim; first += 32) {
    const float unit = bits_to_float(uint32_t{load16(units, first / 32)} << 16);
    for (int d = first; d < first + 32; d++) out[d] = static_cast<float>(static_cast<Code>(codes[d])) * unit;
  }
}

// Scales [D] and offsets [D] of a tile's channels.
void load_channels(const TileShape& s, const uint8_t* tile, float* scale, float* offset) {
  const uint8_t *parameters = tile + s.parameters, *units = parameters + 2 * s.dim;
  if (s.byte_channels) {
    load_byte_parameters<uint8_t>(parameters, units, s.dim, scale);
    load_byte_parameters<int8_t>(parameters + s.dim, units + s.dim / 16, s.dim, offset);
  } else {
    load_row(SKV_FLOAT16, parameters, scale, s.dim);
    load_row(SKV_FLOAT16, parameters + 2 * s.dim, offset, s.dim);
  }
}

// Numbers [D] in 8 bits (reference: _channels_in_bytes): unsigned codes are rounded up, signed ones down.
template <class Code>
void store_byte_parameters(const float* numbers, int dim, uint8_t* codes, uint8_t* units) {
  constexpr bool kSigned = static_cast<Code>(-1) < 0;
  constexpr float kLow = kSigned ? -128.0f : 0.0f, kHigh = kSigned ? 127.0f : 255.0f;
  for (int first = 0; first < dim; first += 32) {
    float largest = 0;
    for (int d = first; d < first + 32; d++) {
      const float size = numbers[d] < 0.0f ? -numbers[d] : numbers[d];
      largest = size > largest ? size : largest;
    }
    const uint16_t stored_unit = float_to_bfloat(largest / kHigh);
    const float unit = bits_to_float(uint32_t{stored_unit} << 16);
    store16(units, first / 32, stored_unit);
    for (int d = first; d < first + 32; d++) {
      const float quotient = divide(numbers[d], unit);
      const float code = kSigned ? __builtin_floorf(quotient) : __builtin_ceilf(quotient);
      codes[d] = static_cast<uint8_t>(static_cast<Code>(code < kLow ? kLow : code > kHigh ? kHigh : code));
    }
  }
}

// From the smallest and largest numbers [D] of the channels; overwrites `high`.
void encode_byte_channels(const TileShape& s, const float* low, float* high, float levels, uint8_t* tile) {
  uint8_t *scales = tile + s.parameters, *offsets = scales + s.dim, *units = offsets + s.dim;
  const int held = s.dim / 8;  // of the units' bytes
  memset(units + held, 0, static_cast<size_t>((held + 15) / 16 * 16 - held));
  float start[skv::kMaxDim];
  store_byte_parameters<int8_t>(low, s.dim, offsets, units + s.dim / 16);
  load_byte_parameters<int8_t>(offsets, units + s.dim / 16, s.dim, start);
  for (int d = 0; d < s.dim; d++) {
    const float range = high[d] - start[d];
    high[d] = (range > 0.0f ? range : 0.0f) / levels;
  }
  store_byte_parameters<uint8_t>(high, s.dim, scales, units);
}

void encode_channel_parameters(const TileShape& s, const float* content, float* scale, float* offset, uint8_t* tile) {
  const float levels = static_cast<float>((1 << s.bits) - 1);
  float low[skv::kMaxDim], high[skv::kMaxDim];
  memcpy(low, content, sizeof(float) * s.dim);
  memcpy(high, content, sizeof(float) * s.dim);
  for (int t = 1; t < s.tile_tokens; t++) {
    const float* row = content + static_cast<int64_t>(t) * s.dim;
    for (int d = 0; d < s.dim; d++) {
      low[d] = row[d] < low[d] ? row[d] : low[d];
      high[d] = row[d] > high[d] ? row[d] : high[d];
    }
  }
  uint8_t* parameters = tile + s.parameters;
  for (int d = 0; d < s.dim; d++) {
    low[d] += 0.0f;  // of -0 and 0 both are 0
    high[d] += 0.0f;
  }
  // Up to two bits the levels are the middles of equal cells (reference: CHANNEL_MARGIN).
  for (int d = 0; s.bits <= 2 && d < s.dim; d++) {
    const float margin = (high[d] - low[d]) * (s.bits == 1 ? 0.25f : 0.125f);
    low[d] += margin;
    high[d] -= margin;
  }
  if (s.byte_channels) {
    encode_byte_channels(s, low, high, levels, tile);
  } else {
    for (int d = 0; d < s.dim; d++) {
      store16(parameters, d, float_to_half((high[d] - low[d]) / levels));
      store16(parameters, s.dim + d, float_to_half(low[d]));
    }
  }
  load_channels(s, tile, scale, offset);
}

// Means of a tile's channels in 8 bits: int8 codes [D], then the float16 unit, then zeros (reference: _means).
void load_means(const TileShape& s, const uint8_t* tile, float* means) {
  const float unit = half_to_float(load16(tile + s.means + s.dim, 0));
  for (int d = 0; d < s.dim; d++) means[d] = static_cast<float>(static_cast<int8_t>(tile[s.means + d])) * unit;
}

// `work` holds half a tile.
void encode_means(const TileShape& s, const float* content, uint8_t* tile, float* work) {
  int count = s.tile_tokens / 2 * s.dim;
  for (int i = 0; i < count; i++) work[i] = content[i] + content[i + count];
  while (count > s.dim) {
    count /= 2;
    for (int i = 0; i < count; i++) work[i] += work[i + count];
  }
  float largest = 0;
  for (int d = 0; d < s.dim; d++) {
    work[d] /= static_cast<float>(s.tile_tokens);
    const float size = work[d] < 0.0f ? -work[d] : work[d];
    largest = size > largest ? size : largest;
  }
  const uint16_t stored_unit = float_to_half(largest / 127.0f);
  const float unit = half_to_float(stored_unit);
  for (int d = 0; d < s.dim; d++) {
    const float code = divide(work[d], unit);
    const float clipped = code < -127.0f ? -127.0f : code > 127.0f ? 127.0f : code;
    tile[s.means + d] = static_cast<uint8_t>(static_cast<int8_t>((clipped + 12582912.0f) - 12582912.0f));
  }
  memset(tile + s.means + s.dim, 0, 16);
  store16(tile + s.means + s.dim, 0, stored_unit);
}

// What the errors [D][kStrip] of channels from `end` on add to the kProductRows channels before it: sums
// [kProductRows][kStrip], each from the last error to the first.
void sum_feedback(const float* feedback, const float* errors, int dim, int end, float* sums) {
  for (int t = 0; t < kStrip; t += kPanel) {
    Lanes block[kProductRows][2] = {};
    for (int j = dim - 1; j >= end; j--) {
      const float *shares = feedback + int64_t{j} * dim + end - kProductRows, *error = errors + j * kStrip + t;
      const Lanes left = load_lanes(error), right = load_lanes(error + kRegister);
      for (int b = 0; b < kProductRows; b++) {
        block[b][0] += left * shares[b];
        block[b][1] += right * shares[b];
      }
    }
    for (int b = 0; b < kProductRows; b++) {
      store_lanes(sums + b * kStrip + t, block[b][0]);
      store_lanes(sums + b * kStrip + t + kRegister, block[b][1]);
    }
  }
}

// Codes of a strip [D][kStrip] in its tile's basis, channels from the last to the first; each is lowered by its share
// of what those after it were rounded up (reference: _quantize_calibrated). `errors` holds a strip.
//
// Channels go in blocks: first each takes its shares of the blocks behind, then, one by one, those within the block.
void quantize_with_feedback(const TileShape& s, const float* feedback, const float* strip, const float* scale,
                            const float* offset, uint8_t* codes, float* errors) {
  const float levels = static_cast<float>((1 << s.bits) - 1);
  for (int end = s.dim; end > 0; end -= kProductRows) {
    const int first = end - kProductRows;
    float shift[kProductRows * kStrip];
    sum_feedback(feedback, errors, s.dim, end, shift);
    for (int j = end - 1; j >= first; j--) {
      const float *shares = feedback + int64_t{j} * s.dim, *below = shift + (j - first) * kStrip;
      float* error = errors + j * kStrip;
      for (int t = 0; t < kStrip; t++) {
        const float x = strip[j * kStrip + t];
        const float code = round_clip(divide((x - below[t]) - offset[j], scale[j]), levels);
        codes[j * kStrip + t] = static_cast<uint8_t>(code);
        error[t] = (code * scale[j] + offset[j]) - x;
      }
      for (int d = first; d < j; d++) {
        for (int t = 0; t < kStrip; t++) shift[(d - first) * kStrip + t] += shares[d] * error[t];
      }
    }
  }
}

void encode_tile(const TileShape* shape, const float* feedback, const float* content, uint8_t* tile) {
  const TileShape& s = *shape;
  if (s.bits == 16) {
    store_row(s.row_type, content, tile, s.tile_tokens * s.dim);
    return;
  }
  const float levels = static_cast<float>((1 << s.bits) - 1);
  float strip[skv::kMaxDim * kStrip], work[2 * skv::kMaxDim * kStrip];
  float scale[skv::kMaxDim], offset[skv::kMaxDim];
  uint8_t codes[skv::kMaxDim * kStrip];
  if (s.channel) encode_channel_parameters(s, content, scale, offset, tile);
  if (s.means) {
    encode_means(s, content, tile, work);
    load_means(s, tile, offset);
  }
  for (int first = 0; first < s.tile_tokens; first += kStrip) {
    transpose_in(content + static_cast<int64_t>(first) * s.dim, s.dim, strip);
    if (feedback) {
      quantize_with_feedback(s, feedback, strip, scale, offset, codes, work);
    } else if (s.channel) {
      for (int d = 0; d < s.dim; d++) {
        for (int t = 0; t < kStrip; t++) {
          const float x = divide(strip[d * kStrip + t] - offset[d], scale[d]);
          codes[d * kStrip + t] = static_cast<uint8_t>(round_clip(x, levels));
        }
      }
    } else {
      for (int i = 0; s.means && i < s.dim * kStrip; i++) strip[i] -= offset[i / kStrip];
      for (int group = 0; group < s.dim / s.group_size; group++) {
        float scales[kStrip];
        const int64_t start = static_cast<int64_t>(group) * s.group_size * kStrip;
        quantize_midrise(strip + start, s.group_size, s.bits, codes + start, scales, work);
        for (int t = 0; t < kStrip; t++) {
          store16(tile + s.parameters, group * s.tile_tokens + first + t, float_to_half(scales[t]));
        }
      }
    }
    pack_strip(s, codes, first, tile);
  }
}

// Tokens first ... first + kStrip - 1 of a tile of codes as rows [kStrip][D].
void decode_strip(const TileShape& s, const uint8_t* tile, int first, float* rows) {
  uint8_t codes[skv::kMaxDim * kStrip];
  float strip[skv::kMaxDim * kStrip];
  unpack_strip(s, tile, first, codes);
  const uint8_t* parameters = tile + s.parameters;
  const float middle = static_cast<float>((1 << s.bits) - 1) / 2;
  float scale[kStrip], means[skv::kMaxDim], steps[skv::kMaxDim], offsets[skv::kMaxDim];
  if (s.means) load_means(s, tile, means);
  if (s.channel) load_channels(s, tile, steps, offsets);
  for (int d = 0; d < s.dim; d++) {
    const uint8_t* channel = codes + d * kStrip;
    float* out = strip + d * kStrip;
    if (s.channel) {
      for (int t = 0; t < kStrip; t++) out[t] = static_cast<float>(channel[t]) * steps[d] + offsets[d];
      continue;
    }
    if (d % s.group_size == 0) {
      const int64_t start = static_cast<int64_t>(d / s.group_size) * s.tile_tokens + first;
      load_row(SKV_FLOAT16, parameters + 2 * start, scale, kStrip);
    }
    for (int t = 0; t < kStrip; t++) out[t] = (static_cast<float>(channel[t]) - middle) * scale[t];
    for (int t = 0; s.means && t < kStrip; t++) out[t] += means[d];
  }
  transpose_out(strip, s.dim, rows);
}

void decode_tile(const TileShape* shape, const uint8_t* tile, float* content) {
  const TileShape& s = *shape;
  if (s.bits == 16) {
    load_row(s.row_type, tile, content, s.tile_tokens * s.dim);
    return;
  }
  for (int first = 0; first < s.tile_tokens; first += kStrip) {
    decode_strip(s, tile, first, content + static_cast<int64_t>(first) * s.dim);
  }
}

}  // namespace
