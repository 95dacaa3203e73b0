// Attention of many new tokens: the dequantized past and the new tokens are float16 rows in scratch memory, and tensor
// cores attend to them block by block with an online softmax (FlashAttention-2, arXiv 2307.08691).
//
// A block of 4 warps takes 64 rows of queries, (token, head of the group) pairs of one KV head, and walks over its
// split of the keys, 64 at a time: few new tokens behind a long past would leave most of the device idle otherwise.
// Lane (r, c) = (l / 4, l % 4) of a warp holds rows r and r + 8 of its 16.
#include "launchers.h"

namespace skv::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kRows = kPrefillRows, kKeys = 64;

template <int D>
struct Prefill {
  static constexpr int kStride = D + 8;  // halves: 16 bytes keep neighbouring rows off each other's banks
  static constexpr int kShared = (kRows + 2 * kKeys) * kStride * 2;

  const Attention& a;
  const Sequence& s;
  half *queries, *keys, *values;  // shared
  int r, c, warp_row, first_row;
  float o[D / 8][4], peak[2], sum[2];

  SKV_DEVICE Prefill(const Attention& a, const Sequence& s, half* shared)
      : a(a), s(s), queries(shared), keys(shared + kRows * kStride), values(keys + kKeys * kStride) {
    r = threadIdx.x % 32 / 4;
    c = threadIdx.x % 4;
    warp_row = threadIdx.x / 32 * 16;
    first_row = int(gridDim.x - 1 - blockIdx.x) * kRows;  // the last rows see the most keys: they start first
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) o[i][e] = 0;
    }
    peak[0] = peak[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  SKV_DEVICE int position(int row) const { return s.past + (first_row + row) / a.group(); }

  SKV_DEVICE void load_queries(int b, int head) {
    for (int row = threadIdx.x / 32; row < kRows; row += kWarps) {
      const int column = first_row + row, lane = threadIdx.x % 32;
      float x[D / 32] = {};
      if (column < a.columns) {
        load_token(a.query, int64_t{b} * a.lengths.tokens + column / a.group(), head * a.group() + column % a.group(),
                   x);
      }
#pragma unroll
      for (int e = 0; e < D / 32; e++) queries[row * kStride + lane + 32 * e] = __float2half_rn(saturated(x[e]));
    }
  }

  // Rows [first, first + kKeys) of keys and values; zeros past the end, where scratch holds anything.
  SKV_DEVICE void load_keys(const half* all_keys, const half* all_values, int first) {
    for (int i = threadIdx.x; i < kKeys * D / 8; i += kThreads) {
      const int key = i / (D / 8), piece = i % (D / 8) * 8;
      half *k = keys + key * kStride + piece, *v = values + key * kStride + piece;
      if (first + key < s.total) {
        async_copy16(k, all_keys + int64_t{first + key} * D + piece);
        async_copy16(v, all_values + int64_t{first + key} * D + piece);
      } else {
        *reinterpret_cast<uint4*>(k) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(v) = make_uint4(0, 0, 0, 0);
      }
    }
    async_commit();
  }

  static SKV_DEVICE uint32_t two_halves(const half* from) { return *reinterpret_cast<const uint32_t*>(from); }

  SKV_DEVICE void scores(float (&x)[kKeys / 8][4]) const {
#pragma unroll
    for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) x[i][e] = 0;
    }
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      const half* q = queries + (warp_row + r) * kStride + d + 2 * c;
      const uint32_t A[4] = {two_halves(q), two_halves(q + 8 * kStride), two_halves(q + 8),
                             two_halves(q + 8 * kStride + 8)};
#pragma unroll
      for (int i = 0; i < kKeys / 8; i++) {
        const half* k = keys + (8 * i + r) * kStride + d + 2 * c;
        const uint32_t b[2] = {two_halves(k), two_halves(k + 8)};
        mma(x[i], A, b);
      }
    }
  }

  SKV_DEVICE bool hidden(int row, int key) const {
    const int at = position(row);
    return key > at || (a.window > 0 && key <= at - a.window);
  }

  // Scores of keys [first, first + kKeys) -> weights.
  SKV_DEVICE void softmax(float (&x)[kKeys / 8][4], int first) {
    const float unit = a.softcap > 0 ? 1.f : a.scale * kLog2E;
    float higher[2] = {peak[0], peak[1]};
#pragma unroll
    for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (a.softcap > 0) x[i][e] = a.softcap * kLog2E * tanhf(x[i][e] * a.scale / a.softcap);
        if (hidden(warp_row + r + e / 2 * 8, first + 8 * i + 2 * c + e % 2)) x[i][e] = -INFINITY;
        higher[e / 2] = fmaxf(higher[e / 2], x[i][e]);
      }
    }
    float shrink[2], least[2];
#pragma unroll
    for (int y = 0; y < 2; y++) {
      higher[y] = fmaxf(higher[y], __shfl_xor_sync(kWarp, higher[y], 1));
      higher[y] = fmaxf(higher[y], __shfl_xor_sync(kWarp, higher[y], 2));
      shrink[y] = peak[y] == -INFINITY ? 0.f : fast_exp2((peak[y] - higher[y]) * unit);
      least[y] = higher[y] == -INFINITY ? 0.f : -higher[y] * unit;
      peak[y] = higher[y];
      sum[y] *= shrink[y];
    }
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) o[i][e] *= shrink[e / 2];
    }
#pragma unroll
    for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        x[i][e] = fast_exp2(x[i][e] * unit + least[e / 2]);
        sum[e / 2] += x[i][e];
      }
    }
  }

  SKV_DEVICE void add_values(const float (&x)[kKeys / 8][4]) {
#pragma unroll
    for (int i = 0; i < kKeys / 8; i += 2) {  // 16 keys: two tiles of scores are one operand
      const uint32_t A[4] = {bits_of(__floats2half2_rn(x[i][0], x[i][1])), bits_of(__floats2half2_rn(x[i][2], x[i][3])),
                             bits_of(__floats2half2_rn(x[i + 1][0], x[i + 1][1])),
                             bits_of(__floats2half2_rn(x[i + 1][2], x[i + 1][3]))};
#pragma unroll
      for (int j = 0; j < D / 8; j++) {
        const half* v = values + (8 * i + r) * kStride + 8 * j + 2 * c;
        const uint32_t b[2] = {transpose8x8(two_halves(v)), transpose8x8(two_halves(v + 8 * kStride))};
        mma(o[j], A, b);
      }
    }
  }

  SKV_DEVICE void add_lanes_sums() {
#pragma unroll
    for (int y = 0; y < 2; y++) {
      sum[y] += __shfl_xor_sync(kWarp, sum[y], 1);
      sum[y] += __shfl_xor_sync(kWarp, sum[y], 2);
    }
  }

  // Of a split, for the merge; where it has no keys, the sums of zero alone.
  SKV_DEVICE void write_partial(bool any) {
    const float unit = a.softcap > 0 ? 1.f : a.scale * kLog2E;
#pragma unroll
    for (int y = 0; y < 2; y++) {
      const int column = first_row + warp_row + r + 8 * y;
      if (column >= a.columns) continue;
      const int64_t row = (int64_t{blockIdx.y} * a.splits + blockIdx.z) * a.columns + column;
      if (c == 0) a.peaks[row] = make_float2(peak[y] * unit * kLn2, sum[y]);
#pragma unroll
      for (int j = 0; any && j < D / 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) a.partial[row * D + 8 * j + 2 * c + e] = o[j][2 * y + e];
      }
    }
  }

  SKV_DEVICE void write(int b, int head) {
#pragma unroll
    for (int y = 0; y < 2; y++) {
      const int column = first_row + warp_row + r + 8 * y, token = column / a.group();
      if (column >= a.columns) continue;
      const int query_head = head * a.group() + column % a.group();
      float factor = token < s.fresh ? 1 / sum[y] : 0.f;
      if (a.head_sink && token < s.fresh) {
        const float unit = a.softcap > 0 ? 1.f : a.scale * kLog2E;
        const float sink = load(a.head_sink, query_head, a.output_type) * kLog2E, top = fmaxf(peak[y] * unit, sink);
        const float shrink = exp2f(peak[y] * unit - top);
        factor = shrink / (sum[y] * shrink + exp2f(sink - top));
      }
      const int64_t row = (int64_t{b} * a.lengths.tokens + token) * a.num_heads + query_head;
      const int head_dim = a.value.layout.head_dim;
#pragma unroll
      for (int j = 0; j < D / 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int d = 8 * j + 2 * c + e;
          const float out = !s.valid ? NAN : token < s.fresh ? o[j][2 * y + e] * factor : 0.f;
          if (d < head_dim) store(a.output, row * head_dim + d, a.output_type, out);
        }
      }
    }
  }
};

// Grid: groups of kRows columns, sequence and head, splits.
template <int D>
__global__ void __launch_bounds__(kThreads)
    prefill_kernel(Attention a, const half* keys, const half* values, int64_t head_stride) {
  SKV_DYNAMIC_SHARED(shared);
  const int pair = a.first_pair + blockIdx.y, b = pair / a.kv_num_heads, head = pair % a.kv_num_heads;
  const Sequence s = sequence(a.lengths, b, a.key, a.value);
  Prefill<D> p(a, s, reinterpret_cast<half*>(shared));
  bool any = false;
  if (s.valid && p.first_row / a.group() < s.fresh) {
    p.load_queries(b, head);
    const int last = (p.first_row + kRows - 1) / a.group(), newest = last < s.fresh ? last : s.fresh - 1;
    const int all = s.past + newest + 1, oldest = p.position(0) + 1 - a.window;
    const int begin = a.window > 0 && oldest > 0 ? oldest / kKeys * kKeys : 0;
    const int blocks = (all - begin + kKeys - 1) / kKeys, share = (blocks + a.splits - 1) / a.splits * kKeys;
    const int from = begin + int(blockIdx.z) * share, end = from + share < all ? from + share : all;
    const int64_t start = int64_t{blockIdx.y} * head_stride * D;
    any = from < end;
    for (int first = from; first < end; first += kKeys) {
      p.load_keys(keys + start, values + start, first);
      async_wait<0>();
      __syncthreads();
      float x[kKeys / 8][4];
      p.scores(x);
      p.softmax(x, first);
      p.add_values(x);
      __syncthreads();
    }
  }
  p.add_lanes_sums();
  if (a.splits > 1) {
    p.write_partial(any);
  } else {
    p.write(b, head);
  }
}

template <int D>
cudaError_t run(const Attention& a, const Rows& keys, const Rows& values, void* stream) {
  const dim3 grid((a.columns + kRows - 1) / kRows, a.pairs, a.splits);
  return launch(prefill_kernel<D>, grid, kThreads, Prefill<D>::kShared, stream, a, static_cast<const half*>(keys.data),
                static_cast<const half*>(values.data), keys.head_stride);
}

}  // namespace

#ifdef SKV_CUDA_FEW
bool prefill_covers(int32_t dim) { return dim == SKV_CUDA_FEW; }
#else
bool prefill_covers(int32_t dim) { return dim == 64 || dim == 96 || dim == 128 || dim == 256; }
#endif

cudaError_t prefill(const Attention& a, const Rows& keys, const Rows& values, void* stream) {
  switch (a.key.dim) {
#ifdef SKV_CUDA_FEW
    case SKV_CUDA_FEW:
      return run<SKV_CUDA_FEW>(a, keys, values, stream);
#else
    case 64:
      return run<64>(a, keys, values, stream);
    case 96:
      return run<96>(a, keys, values, stream);
    case 128:
      return run<128>(a, keys, values, stream);
    case 256:
      return run<256>(a, keys, values, stream);
#endif
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace skv::cuda
