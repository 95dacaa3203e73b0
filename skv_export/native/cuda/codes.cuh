// Converts packed codes to operands of the tensor cores: one LOP3 puts two codes into the mantissas of two halves.
//
// A 32-bit word of a plane holds two 16-bit halves with the same fields in each. Moved to bit e >= 1 of the mantissa
// and given the exponent of 1024 (0x6400), the field x reads as 1024 + x * 2^e: `raw`. Keys are multiplied in this
// form, with 2^-e folded into the query and what the sum has too much taken off by a constant; values are brought to
// code - middle by one more HFMA2, exactly (that is why e is at least 1: 512 + 1.5 is a half, 1024 + 1.5 is not).
#pragma once
#include "portable.cuh"

namespace skv::cuda {

constexpr uint32_t kHalf1024 = 0x64006400;
constexpr uint32_t kMinus1024 = 0xE400E400;
constexpr uint32_t kOne = 0x3C003C00;
// Means are signed bytes: with the sign flipped, and under the exponent of 1024, one reads as 1152 + the code.
constexpr uint32_t kFlipSigns = 0x80808080;
constexpr uint32_t kMinus1152 = 0xE480E480;

SKV_DEVICE uint32_t shifted_right(uint32_t x, int bits) { return bits >= 0 ? x >> bits : x << -bits; }
SKV_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
SKV_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }
SKV_DEVICE uint32_t multiplied(uint32_t a, uint32_t b) { return bits_of(__hmul2(half2_of(a), half2_of(b))); }
SKV_DEVICE uint32_t added(uint32_t a, uint32_t b) { return bits_of(__hfma2(half2_of(a), half2_of(kOne), half2_of(b))); }

// Codes of `Bits` bits: 2, 3 (a plane of 2 and one of 1), 4 or 8.
template <int Bits>
struct Codes {
  static_assert(Bits == 2 || Bits == 3 || Bits == 4 || Bits == 8);
  static constexpr int kWidth = Bits == 3 ? 2 : Bits;  // of the first plane
  static constexpr bool kTwoPlanes = Bits == 3;
  static constexpr int kFields = 8 / kWidth;  // per byte of the first plane
  static constexpr int kPairs = 2 * kFields;  // of fields per word: bytes 0 and 2, then bytes 1 and 3
  static constexpr uint32_t kLevels = (1u << Bits) - 1;

  // e of pair i, whose field is the (i % kFields)-th of its byte.
  SKV_CONSTANT int exponent(int i) {
    const int field = i % kFields;
    return kTwoPlanes ? (field == 0 ? 1 : 2 * field - 1) : 1 + kWidth * field;
  }
  // 2^-e in both halves.
  SKV_CONSTANT uint32_t unit(int i) { return uint32_t(15 - exponent(i)) << 10 | uint32_t(15 - exponent(i)) << 26; }
  // -(2^(10 - e) + middle) in both halves.
  SKV_CONSTANT uint32_t minus_middle(int i) {
    const uint32_t bits = 0x8000u | uint32_t(25 - exponent(i)) << 10 | kLevels << (exponent(i) - 1);
    return bits << 16 | bits;
  }
  // 2^(bits - 1), the code in the middle of the keys' range, and -(1024 + 2^e * that) in both halves.
  SKV_CONSTANT uint32_t center() { return uint32_t(14 + Bits) << 10 | uint32_t(14 + Bits) << 26; }
  SKV_CONSTANT uint32_t minus_raw_center(int i) {
    const uint32_t bits = 0x8000u | 25u << 10 | 1u << (exponent(i) + Bits - 1);
    return bits << 16 | bits;
  }
  // -middle in both halves.
  SKV_CONSTANT uint32_t minus_middle() {
    const uint32_t bits = 0x8000u | uint32_t(13 + Bits) << 10 | (kLevels << (11 - Bits) & 0x3ff);
    return bits << 16 | bits;
  }

  // Pair i of a word of the first plane; its field in `low`, a word of the second plane, stands at bit `low_bit` of
  // both halves.
  static SKV_DEVICE uint32_t raw(uint32_t word, uint32_t low, int low_bit, int i, uint32_t half_1024) {
    const int e = exponent(i), at = i / kFields * 8 + i % kFields * kWidth;
    const uint32_t mask = (1u << kWidth) - 1, both = mask << 16 | mask;
    if constexpr (!kTwoPlanes) return and_or(shifted_right(word, at - e), both << e, half_1024);
    const uint32_t second = and_or(shifted_right(low, low_bit - e), 0x00010001u << e, half_1024);
    return and_or(shifted_right(word, at - e - 1), both << (e + 1), second);
  }
  // code - middle of pair i, from raw.
  static SKV_DEVICE uint32_t centered(uint32_t raw, int i) {
    return bits_of(__hfma2(half2_of(raw), half2_of(unit(i)), half2_of(minus_middle(i))));
  }
};

// A lane's 16 channels of a chunk of 64 in the order of key words: pair x (0 ... 7) holds channels first(x) and
// first(x) + distance, as the fields of one word do.
template <int Bits>
struct KeyOrder {
  using C = Codes<Bits>;
  static constexpr int kDistance = C::kPairs;  // channels between the halves of a word
  SKV_CONSTANT int first(int x) { return x / C::kPairs * 2 * kDistance + x % C::kPairs; }
  // Place of a channel among the 16 halves of the pairs in order.
  static SKV_DEVICE int place(int channel) {
    const int word = channel / (2 * kDistance), rest = channel % (2 * kDistance);
    return 2 * (word * C::kPairs + rest % kDistance) + rest / kDistance;
  }
  // Pair x from 16 consecutive halves.
  static SKV_DEVICE uint32_t pair(const uint32_t (&halves)[8], int x) {
    const uint32_t a = halves[first(x) / 2], b = halves[(first(x) + kDistance) / 2];
    return first(x) % 2 ? high_halves(a, b) : low_halves(a, b);
  }
  // Pair x of 16 consecutive bytes, under the exponent of 1024.
  static SKV_DEVICE uint32_t bytes(const uint32_t (&all)[4], int x, uint32_t half_1024) {
    const int a = first(x), b = first(x) + kDistance;
    return and_or(__byte_perm(all[a / 4], all[b / 4], (4 + b % 4) << 8 | a % 4), 0x00ff00ff, half_1024);
  }
};

SKV_DEVICE void load16(const void* from, uint32_t* to) {
  const uint4 u = *static_cast<const uint4*>(from);
  to[0] = u.x;
  to[1] = u.y;
  to[2] = u.z;
  to[3] = u.w;
}
SKV_DEVICE void load8(const void* from, uint32_t* to) {
  const uint2 u = *static_cast<const uint2*>(from);
  to[0] = u.x;
  to[1] = u.y;
}

// One slab of 32 tokens of a plane in shared memory, swizzled so that a warp's reads hit each bank once.
//
// Keys: rows [D*p/32] of 32 tokens, 4 bytes each. Values: rows [8] (four tokens) of D*p/8 words. Both are copied in
// pieces of 16 bytes. Lane 8 j + l takes piece l of eight, of rows whose swizzle is the same for all: so a lane's
// addresses in global and in shared memory differ from each other by constants.
template <int D, int Width>
struct KeyPlane {
  static constexpr int kBytes = 4 * D * Width, kRows = D * Width / 32;
  static constexpr int kWordsPerLane = Width == 1 ? 1 : Width / 2;  // of a chunk; with 1 bit two lanes share a word

  static SKV_DEVICE int swizzle(int row) { return (row / kWordsPerLane & 3) << 1; }
  static SKV_DEVICE int at(int row, int piece) { return row * 128 + (piece ^ swizzle(row)) * 16; }

  // Where this lane's first piece stands in a tile, and in a slab: row kWordsPerLane * j.
  static SKV_DEVICE int lane_offset(int tile_tokens) {
    const int row = threadIdx.x % 32 / 8 * kWordsPerLane;
    return row * tile_tokens * 4 + (threadIdx.x % 8 ^ swizzle(row)) * 16;
  }
  static SKV_DEVICE int lane_place() { return threadIdx.x % 32 / 8 * kWordsPerLane * 128 + threadIdx.x % 8 * 16; }
  // `from` and `to` are this lane's.
  static SKV_DEVICE void copy(uint8_t* to, const uint8_t* from, int tile_tokens) {
#pragma unroll
    for (int i = 0; i < (kRows + 3) / 4; i++) {
      const int row = i / kWordsPerLane * 4 * kWordsPerLane + i % kWordsPerLane;  // after the lane's first
      if (kRows >= 4 || threadIdx.x % 32 / 8 < kRows) async_copy16(to + row * 128, from + row * 4 * tile_tokens);
    }
  }
  // Word j of this lane's channels of a chunk, for tokens 2r and 2r + 1 of a group of 16.
  static SKV_DEVICE void read(const uint8_t* slab, int chunk, int j, int group, uint32_t (&words)[2]) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int row = Width == 1 ? 2 * chunk + c / 2 : chunk * 2 * Width + c * kWordsPerLane + j;
    load8(slab + at(row, 4 * group + r / 2) + r % 2 * 8, words);
  }
};

template <int D, int Width>
struct ValuePlane {
  static constexpr int kBytes = 4 * D * Width, kPieces = D * Width / 32;  // of 16 bytes, per row

  static SKV_DEVICE int swizzle(int row) {
    if (kPieces >= 8) return Width == 8 ? (row & 1) | (row & 2) << 1 : (row & 3) << 1;
    return kPieces == 4 ? row & 2 : 0;
  }
  static SKV_DEVICE int at(int row, int piece) { return (row * kPieces + (piece ^ swizzle(row))) * 16; }

  static constexpr int kAtOnce = kPieces < 8 ? kPieces : 8;  // of a row, in one go: row j, and with 8 of them j + 4 too
  static SKV_DEVICE int lane_row() { return threadIdx.x % 32 / kAtOnce; }
  static SKV_DEVICE int lane_offset() {
    return (lane_row() * kPieces + (threadIdx.x % kAtOnce ^ swizzle(lane_row()))) * 16;
  }
  static SKV_DEVICE int lane_place() { return (lane_row() * kPieces + threadIdx.x % kAtOnce) * 16; }
  static SKV_DEVICE void copy(uint8_t* to, const uint8_t* from) {
    if constexpr (kPieces < 8) {
      if (lane_row() < 8) async_copy16(to, from);
    } else {
#pragma unroll
      for (int i = 0; i < kPieces / 4; i++) {
        const int further = (i % 2 * 4 * kPieces + i / 2 * 8) * 16;
        async_copy16(to + further, from + further);
      }
    }
  }
  // This lane's 8 channels of a chunk for four tokens: Width words.
  static SKV_DEVICE void read(const uint8_t* slab, int chunk, int row, uint32_t (&words)[Width]) {
    const int r = threadIdx.x % 32 / 4, first = (32 * chunk + 4 * r) * Width;
    const uint8_t* from = slab + at(row, first / 16);
    if constexpr (Width == 8) {
      load16(from, words);
      load16(slab + at(row, first / 16 + 1), words + 4);
    } else if constexpr (Width == 4) {
      load16(from, words);
    } else if constexpr (Width == 2) {
      load8(from + first % 16, words);
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(from + first % 16);
    }
  }
};

}  // namespace skv::cuda
