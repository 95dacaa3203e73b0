// The work of one warp of decode_mma: scores, weights and values of 32 tokens at a time (see decode_mma.cuh).
#pragma once
#include "channels.cuh"
#include "mma_shape.cuh"

namespace skv::cuda {

template <class S>
struct Warp {
  static constexpr int B = S::Blocks, M = S::kChunks;
  using K = typename S::K;
  using V = typename S::V;
  using Order = typename S::Order;

  const Attention& a;
  const Work& work;
  unsigned char* shared;
  int r, c, first_column;
  uint32_t half_1024;
  float unit;       // a score times this is an exponent of 2
  int query[B][2];  // positions of this lane's columns

  uint32_t q[B][M][8];  // the B operand for raw keys: pairs of the folded query
  static constexpr int kStarts = S::KPerToken ? M : 1;
  float start[B][kStarts][2];  // scores before the first product, of columns 2c and 2c + 1: the same for all tokens
  float o[B][4 * M][4], peak[B][2], sum[B][2];

  SKV_DEVICE Warp(const Attention& a, const Work& work, unsigned char* shared)
      : a(a), work(work), shared(shared), r(threadIdx.x % 32 / 4), c(threadIdx.x % 4) {
    first_column = blockIdx.z * S::kColumns;
    half_1024 = in_register(kHalf1024);
    unit = a.softcap > 0 ? 1.f : a.scale * kLog2E;
#pragma unroll
    for (int n = 0; n < B; n++) {
#pragma unroll
      for (int i = 0; i < 4 * M; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) o[n][i][e] = 0;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        query[n][i] = work.s.past + (first_column + 8 * n + 2 * c + i) / a.group();
        peak[n][i] = -INFINITY;
        sum[n][i] = 0;
      }
    }
    if constexpr (S::KPerToken) {
      prepare_per_token();
#pragma unroll
      for (int n = 0; n < B; n++) {
        if (r == 0) mean_scores(n) = make_float2(0, 0);
      }
    }
  }

  // The query's pairs of a chunk, for the column of this lane's r.
  SKV_DEVICE void load_query(int n, int m, uint32_t (&pairs)[8]) const {
    const unsigned char* from = shared + ((8 * n + r) * S::kQueryStride + 64 * m + 16 * c) * 2;
    load16(from, pairs);
    load16(from + 16, pairs + 4);
  }

  // Adds the product of the same channels for all tokens, a0 and a1, with the pairs b0 and b1 of the query.
  static SKV_DEVICE void add_for_all(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, uint32_t b1) {
    const uint32_t A[4] = {a0, a0, a1, a1}, b[2] = {b0, b1};
    mma(d, A, b);
  }

  SKV_DEVICE void prepare_per_token() {
#pragma unroll
    for (int n = 0; n < B; n++) {
#pragma unroll
      for (int m = 0; m < M; m++) {
        uint32_t pairs[8];
        load_query(n, m, pairs);
        float d[4] = {};
#pragma unroll
        for (int x = 0; x < 8; x += 2) {
#pragma unroll
          for (int i = x; i < x + 2; i++) q[n][m][i] = multiplied(pairs[i], K::unit(i));
          add_for_all(d, K::minus_middle(), K::minus_middle(), pairs[x], pairs[x + 1]);
          add_for_all(d, kMinus1024, kMinus1024, q[n][m][x], q[n][m][x + 1]);
        }
        set_start(n, m, d);
      }
    }
  }
  SKV_DEVICE void set_start(int n, int m, const float (&d)[4]) {
    start[n][S::KPerToken ? m : 0][0] = d[0];
    start[n][S::KPerToken ? m : 0][1] = d[1];
  }

  // Folds a tile's scales into the query and its offsets into the scores' start. With q' = half(q * scale), a key's
  // score is q * offset + q * scale * center + q' * (code - center): the rounding of q' meets no more than half the
  // range.
  SKV_DEVICE void fold(const uint8_t* slab) {
    float sums[B][4] = {};
#pragma unroll
    for (int m = 0; m < M; m++) {
      uint32_t scales[8], offsets[8];  // in pairs, as the query
      load_channels<S::D, Order>(slab + S::kKeyParameters, 64 * m + 16 * c, a.key.layout.parameter_bits == 8, half_1024,
                                 scales, offsets);
#pragma unroll
      for (int n = 0; n < B; n++) {
        uint32_t pairs[8];
        load_query(n, m, pairs);
#pragma unroll
        for (int x = 0; x < 8; x += 2) {
#pragma unroll
          for (int i = x; i < x + 2; i++) q[n][m][i] = multiplied(multiplied(pairs[i], scales[i]), K::unit(i));
          float (&d)[4] = sums[n];
          add_for_all(d, offsets[x], offsets[x + 1], pairs[x], pairs[x + 1]);
          add_for_all(d, multiplied(scales[x], K::center()), multiplied(scales[x + 1], K::center()), pairs[x],
                      pairs[x + 1]);
          add_for_all(d, K::minus_raw_center(x), K::minus_raw_center(x + 1), q[n][m][x], q[n][m][x + 1]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < B; n++) set_start(n, 0, sums[n]);
  }

  // The query times a tile's means, for columns 2c and 2c + 1: in shared memory, as registers are short.
  SKV_DEVICE float2& mean_scores(int n) const {
    float2* scores = reinterpret_cast<float2*>(shared + S::kMeanScores) + threadIdx.x / 32 * S::kColumns / 2;
    return scores[4 * n + c];
  }
  // As fold, with means instead of scales and offsets: their part of every score of the tile.
  SKV_DEVICE void fold_means(const uint8_t* slab) {
    const uint8_t* means = slab + S::kKeyParameters + S::kScales;
    float sums[B][4] = {};
#pragma unroll
    for (int m = 0; m < M; m++) {
      uint32_t bytes[4];
      load16(means + 64 * m + 16 * c, bytes);
#pragma unroll
      for (int i = 0; i < 4; i++) bytes[i] ^= kFlipSigns;
#pragma unroll
      for (int n = 0; n < B; n++) {
        uint32_t pairs[8];
        load_query(n, m, pairs);
#pragma unroll
        for (int x = 0; x < 8; x += 2) {
          add_for_all(sums[n], added(Order::bytes(bytes, x, half_1024), kMinus1152),
                      added(Order::bytes(bytes, x + 1, half_1024), kMinus1152), pairs[x], pairs[x + 1]);
        }
      }
    }
    const float step = __half2float(*reinterpret_cast<const half*>(means + S::D));
#pragma unroll
    for (int n = 0; n < B; n++) {
      if (r == 0) mean_scores(n) = make_float2(sums[n][0] * step, sums[n][1] * step);
    }
    __syncwarp();
  }

  // Scores of a slab: s[g][n] holds tokens 16 g + 2r (+ 1) and columns 2c (+ 1).
  SKV_DEVICE void slab_scores(const uint8_t* slab, float (&s)[2][B][4]) const {
    using Plane = KeyPlane<S::D, K::kWidth>;
    using Second = KeyPlane<S::D, 1>;
    float means[B][2] = {};
    if constexpr (S::KPerToken) {
#pragma unroll
      for (int n = 0; n < B; n++) {
        const float2 both = mean_scores(n);
        means[n][0] = both.x;
        means[n][1] = both.y;
      }
    }
#pragma unroll
    for (int g = 0; g < 2; g++) {
#pragma unroll
      for (int n = 0; n < B; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) s[g][n][e] = S::KPerToken ? means[n][e % 2] : start[n][0][e % 2];
      }
#pragma unroll
      for (int m = 0; m < M; m++) {
        float part[B][4];
        if constexpr (S::KPerToken) {
#pragma unroll
          for (int n = 0; n < B; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) part[n][e] = start[n][S::KPerToken ? m : 0][e % 2];
          }
        }
        uint32_t low[2] = {0, 0};
        if constexpr (K::kTwoPlanes) {
          Second::read(slab + Plane::kBytes, m, 0, g, low);
#pragma unroll
          for (int i = 0; i < 2; i++) low[i] = __byte_perm(low[i], 0, c % 2 ? 0x4342 : 0x4140);
        }
#pragma unroll
        for (int j = 0; j < Plane::kWordsPerLane; j++) {
          uint32_t words[2];
          Plane::read(slab, m, j, g, words);
#pragma unroll
          for (int i = 0; i < K::kPairs; i += 2) {
            uint32_t A[4];
#pragma unroll
            for (int e = 0; e < 4; e++) A[e] = K::raw(words[e % 2], low[e % 2], i + e / 2, i + e / 2, half_1024);
#pragma unroll
            for (int n = 0; n < B; n++) {
              const int x = j * K::kPairs + i;
              const uint32_t b[2] = {q[n][m][x], q[n][m][x + 1]};
              mma(S::KPerToken ? part[n] : s[g][n], A, b);
            }
          }
        }
        if constexpr (S::KPerToken) {
          const int group = 64 * m / a.key.layout.group_size;
          const uint8_t* scales = slab + S::kKeyParameters + group * 64 + (16 * g + 2 * r) * 2;
          const float2 scale = __half22float2(half2_of(*reinterpret_cast<const uint32_t*>(scales)));
#pragma unroll
          for (int n = 0; n < B; n++) {
            s[g][n][0] += part[n][0] * scale.x;
            s[g][n][1] += part[n][1] * scale.x;
            s[g][n][2] += part[n][2] * scale.y;
            s[g][n][3] += part[n][3] * scale.y;
          }
        }
      }
    }
  }

  // Scores -> weights, online; p[g][n] is the B operand of the second product. hidden(token of 32, position of the
  // query) masks.
  template <class Hidden>
  SKV_DEVICE void softmax(float (&s)[2][B][4], uint32_t (&p)[2][B][2], bool masked, Hidden hidden) {
    const auto each = [&](auto body) {
#pragma unroll
      for (int g = 0; g < 2; g++) {
#pragma unroll
        for (int n = 0; n < B; n++) {
#pragma unroll
          for (int e = 0; e < 4; e++) body(g, n, e);
        }
      }
    };
    if (a.softcap > 0) {
      const float inner = a.scale / a.softcap, outer = a.softcap * kLog2E;
      each([&](int g, int n, int e) { s[g][n][e] = outer * tanhf(s[g][n][e] * inner); });
    }
    if (masked) {
      each([&](int g, int n, int e) {
        if (hidden(16 * g + 2 * r + e / 2, query[n][e % 2])) s[g][n][e] = -INFINITY;
      });
    }
    float higher[B][2];
    bool raised = false;
#pragma unroll
    for (int n = 0; n < B; n++) {
      higher[n][0] = peak[n][0];
      higher[n][1] = peak[n][1];
    }
    each([&](int g, int n, int e) { higher[n][e % 2] = fmaxf(higher[n][e % 2], s[g][n][e]); });
#pragma unroll
    for (int n = 0; n < B; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          higher[n][i] = fmaxf(higher[n][i], __shfl_xor_sync(kWarp, higher[n][i], lanes));
        }
        raised |= higher[n][i] > peak[n][i];
      }
    }
    if (__any_sync(kWarp, raised)) rescale(higher);
    float least[B][2];
#pragma unroll
    for (int n = 0; n < B; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) least[n][i] = peak[n][i] == -INFINITY ? 0.f : -peak[n][i] * unit;
    }
#pragma unroll
    for (int g = 0; g < 2; g++) {
#pragma unroll
      for (int n = 0; n < B; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          s[g][n][e] = fast_exp2(s[g][n][e] * unit + least[n][e % 2]);  // 0 where hidden
          sum[n][e % 2] += s[g][n][e];
        }
        p[g][n][0] = transpose8x8(bits_of(__floats2half2_rn(s[g][n][0], s[g][n][1])));
        p[g][n][1] = transpose8x8(bits_of(__floats2half2_rn(s[g][n][2], s[g][n][3])));
      }
    }
  }

  SKV_DEVICE void rescale(const float (&higher)[B][2]) {
#pragma unroll
    for (int n = 0; n < B; n++) {
      float shrink[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        shrink[i] = peak[n][i] == -INFINITY ? 0.f : fast_exp2((peak[n][i] - higher[n][i]) * unit);
        sum[n][i] *= shrink[i];
        peak[n][i] = higher[n][i];
      }
#pragma unroll
      for (int i = 0; i < 4 * M; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) o[n][i][e] *= shrink[e % 2];
      }
    }
  }

  SKV_DEVICE void slab_values(const uint8_t* slab, const uint32_t (&p)[2][B][2]) {
    using Plane = ValuePlane<S::D, V::kWidth>;
    using Second = ValuePlane<S::D, 1>;
    const uint8_t *codes = slab + S::kValueCodes, *parameters = slab + S::kValueParameters;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
      for (int g = 0; g < 2; g++) {
        uint32_t b[B][2];
        if constexpr (!S::VPerChannel) {
          const int group = 64 * m / a.value.layout.group_size;
          uint32_t scale[2];  // tokens 0 1, 2 3 of four
          load8(parameters + group * 64 + (16 * g + 4 * c) * 2, scale);
          const uint32_t even = low_halves(scale[0], scale[1]), odd = high_halves(scale[0], scale[1]);
#pragma unroll
          for (int n = 0; n < B; n++) {
            b[n][0] = multiplied(p[g][n][0], even);
            b[n][1] = multiplied(p[g][n][1], odd);
          }
        }
        uint32_t words[V::kWidth], low[1] = {0};
        Plane::read(codes, m, 4 * g + c, words);
        if constexpr (V::kTwoPlanes) Second::read(codes + Plane::kBytes, m, 4 * g + c, low);
#pragma unroll
        for (int channel = 0; channel < 8; channel += 2) {
          uint32_t scales = 0, offsets = 0;  // of channel and channel + 1
          if constexpr (S::VPerChannel) {    // x = scale * (code - middle) + (offset + scale * middle)
            const uint32_t middle = V::minus_middle() ^ 0x80008000;
            load_two_channels<S::D>(parameters, 64 * m + 8 * r + channel, a.value.layout.parameter_bits == 8, half_1024,
                                    scales, offsets);
            offsets = bits_of(__hfma2(half2_of(scales), half2_of(middle), half2_of(offsets)));
          }
          uint32_t A[4];  // channel, channel + 1 for even tokens, then for odd ones
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int d = channel + e % 2, word = d / V::kFields, i = e / 2 * V::kFields + d % V::kFields;
            A[e] = V::centered(V::raw(words[word], low[0], e / 2 * 8 + d, i, half_1024), i);
            if constexpr (S::VPerChannel) {
              const uint32_t both = e % 2 ? 0x3232 : 0x1010;
              const uint32_t scale = __byte_perm(scales, 0, both), offset = __byte_perm(offsets, 0, both);
              A[e] = bits_of(__hfma2(half2_of(A[e]), half2_of(scale), half2_of(offset)));
            }
          }
#pragma unroll
          for (int n = 0; n < B; n++) {
            if constexpr (S::VPerChannel) {
              mma(o[n][4 * m + channel / 2], A, p[g][n]);
            } else {
              mma(o[n][4 * m + channel / 2], A, b[n]);
            }
          }
        }
      }
    }
  }

  // Adds a slab's weights times the tile's means: 1152 + code in one half of the product, -1152 in the other.
  SKV_DEVICE void add_means(const uint8_t* slab, const uint32_t (&p)[2][B][2]) {
    const uint8_t* means = slab + S::kValueParameters + S::kScales;
    const uint32_t step = *reinterpret_cast<const uint16_t*>(means + S::D) * 0x10001u;
    uint32_t b[B][2];
#pragma unroll
    for (int n = 0; n < B; n++) {
      b[n][0] = b[n][1] = multiplied(added(added(p[0][n][0], p[0][n][1]), added(p[1][n][0], p[1][n][1])), step);
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
      uint32_t bytes[2];
      load8(means + 64 * m + 8 * r, bytes);
#pragma unroll
      for (int channel = 0; channel < 8; channel += 2) {
        const uint32_t codes = bytes[channel / 4] ^ kFlipSigns, both = 0x5050 | channel % 4 * 0x0101u;
        const uint32_t A[4] = {__byte_perm(codes, half_1024, both), __byte_perm(codes, half_1024, both + 0x0101),
                               kMinus1152, kMinus1152};
#pragma unroll
        for (int n = 0; n < B; n++) mma(o[n][4 * m + channel / 2], A, b[n]);
      }
    }
  }

  // A slab of a tile; `position` is its first token's.
  SKV_DEVICE void slab(const uint8_t* slab, bool starts_tile, int position) {
    if constexpr (S::KPerToken) {
      if (a.key.means && starts_tile) fold_means(slab);
    } else {
      if (starts_tile) fold(slab);
    }
    float s[2][B][4];
    slab_scores(slab, s);
    uint32_t p[2][B][2];
    const int last_query = work.s.past + a.lengths.tokens - 1;
    softmax(s, p, a.window > 0 && position <= last_query - a.window,
            [&](int token, int at) { return position + token <= at - a.window; });
    slab_values(slab, p);
    if constexpr (!S::VPerChannel) {
      if (a.value.means) add_means(slab, p);
    }
  }

  // A piece of 32 exact rows: sinks, recent tokens and, from shared memory, new ones.
  SKV_DEVICE const half* exact_row(const Cache& cache, const uint8_t* block, int index, bool is_value) const {
    if (index >= work.exact) return nullptr;
    const int position = work.position(cache.layout, index);
    if (position >= work.s.past) {
      const int row = position - work.s.past + (is_value ? S::kMaxNew : 0);
      return reinterpret_cast<const half*>(shared + S::kNewRows) + row * S::D;
    }
    return reinterpret_cast<const half*>(block + row_start(cache, position));
  }
  static SKV_DEVICE void load_halves(const half* row, int channel, uint32_t* to) {
    if (row) {
      load16(row + channel, to);
    } else {
      to[0] = to[1] = to[2] = to[3] = 0;  // what stands there may be NaN, which no weight of zero undoes
    }
  }

  SKV_DEVICE void exact_piece(const uint8_t* keys, const uint8_t* values, int first) {
    float s[2][B][4];
#pragma unroll
    for (int g = 0; g < 2; g++) {
      const half* rows[2];
#pragma unroll
      for (int i = 0; i < 2; i++) rows[i] = exact_row(a.key, keys, first + 16 * g + 2 * r + i, false);
#pragma unroll
      for (int n = 0; n < B; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) s[g][n][e] = 0;
      }
#pragma unroll
      for (int m = 0; m < M; m++) {
        uint32_t k[2][8];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          load_halves(rows[i], 64 * m + 16 * c, k[i]);
          load_halves(rows[i], 64 * m + 16 * c + 8, k[i] + 4);
        }
#pragma unroll
        for (int n = 0; n < B; n++) {
          uint32_t pairs[8];
          load_query(n, m, pairs);
#pragma unroll
          for (int x = 0; x < 8; x += 2) {
            const uint32_t A[4] = {Order::pair(k[0], x), Order::pair(k[1], x), Order::pair(k[0], x + 1),
                                   Order::pair(k[1], x + 1)};
            const uint32_t b[2] = {pairs[x], pairs[x + 1]};
            mma(s[g][n], A, b);
          }
        }
      }
    }
    uint32_t p[2][B][2];
    softmax(s, p, true, [&](int token, int at) {
      const int row = work.position(a.key.layout, first + token);  // past the end: later than any query
      return row > at || (a.window > 0 && row <= at - a.window);
    });
#pragma unroll
    for (int g = 0; g < 2; g++) {
      const half* rows[4];
#pragma unroll
      for (int i = 0; i < 4; i++) rows[i] = exact_row(a.value, values, first + 16 * g + 4 * c + i, true);
#pragma unroll
      for (int m = 0; m < M; m++) {
        uint32_t v[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) load_halves(rows[i], 64 * m + 8 * r, v[i]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const uint32_t A[4] = {low_halves(v[0][i], v[2][i]), high_halves(v[0][i], v[2][i]),
                                 low_halves(v[1][i], v[3][i]), high_halves(v[1][i], v[3][i])};
#pragma unroll
          for (int n = 0; n < B; n++) mma(o[n][4 * m + i], A, p[g][n]);
        }
      }
    }
  }
};

}  // namespace skv::cuda
