// What reading two-bit values costs with the codes of value_codes.py: the inner loop of the op's weighted sums and
// nothing else, in AVX-512 (VNNI, VBMI) and AVX2.
//
//     g++ -O3 -march=native -std=c++17 benchmarks/value_codes_read.cc -o read && ./read
//
// A byte holds four channels of a token, a lane of 32 bits four tokens, as in the op's tiles. The state of a trellis is
// a channel's two bits and those of the three channels before it, so a byte and the one before it have all four. Its
// level is one of a table of 256 (`table`), or the sum of one of 16 by the state's low four bits and one of 16 by a mix
// of all eight (`sum`: what every instruction set can look up). E8 reads eight channels by two bytes: a table of 256
// magnitudes in 64 bits each, and signs. Per query row one dot product, where the op has two (weights of 16 bits): the
// codes' part is what differs.
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int kBytes = 64 * 128 / 4, kTiles = 64, kRows = 4;  // a tile of 64 tokens and 128 channels

struct Tables {
  alignas(64) uint8_t levels[256];
  alignas(64) uint8_t low[64], mixed[64];  // 16 levels, repeated
  alignas(64) int64_t magnitudes[256];
};

#ifdef __AVX512VBMI__
struct Wide {
  using V = __m512i;
  static constexpr const char* kName = "AVX-512";
  static V load(const void* x) { return _mm512_loadu_si512(x); }
  static V set(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
  static V zero() { return _mm512_setzero_si512(); }
  static V both(V a, V b) { return _mm512_and_si512(a, b); }
  static V mix(V a, V b) { return _mm512_xor_si512(a, b); }
  static V select(V mask, V a, V b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }
  static V add(V a, V b) { return _mm512_add_epi8(a, b); }
  template <int kBits>
  static V right(V x) {
    return _mm512_srli_epi16(x, kBits);
  }
  template <int kBits>
  static V left(V x) {
    return _mm512_slli_epi16(x, kBits);
  }
  static V lookup16(V table, V index) { return _mm512_shuffle_epi8(table, index); }
  static V lookup256(const uint8_t* t, V index) {
    const V low = _mm512_permutex2var_epi8(load(t), index, load(t + 64));
    const V high = _mm512_permutex2var_epi8(load(t + 128), index, load(t + 192));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
  }
  static V dot(V sum, V codes, V weights) { return _mm512_dpbusd_epi32(sum, codes, weights); }
};
#endif

struct Narrow {
  using V = __m256i;
  static constexpr const char* kName = "AVX2";
  static V load(const void* x) { return _mm256_loadu_si256(static_cast<const V*>(x)); }
  static V set(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
  static V zero() { return _mm256_setzero_si256(); }
  static V both(V a, V b) { return _mm256_and_si256(a, b); }
  static V mix(V a, V b) { return _mm256_xor_si256(a, b); }
  static V select(V mask, V a, V b) { return _mm256_or_si256(both(mask, a), _mm256_andnot_si256(mask, b)); }
  static V add(V a, V b) { return _mm256_add_epi8(a, b); }
  template <int kBits>
  static V right(V x) {
    return _mm256_srli_epi16(x, kBits);
  }
  template <int kBits>
  static V left(V x) {
    return _mm256_slli_epi16(x, kBits);
  }
  static V lookup16(V table, V index) { return _mm256_shuffle_epi8(table, index); }
  static V lookup256(const uint8_t* t, V index) {  // sixteen shuffles: there is no larger table
    const V low = both(index, set(15)), high = both(right<4>(index), set(15));
    V found = zero();
    for (int i = 0; i < 16; i++) {
      const V table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t + 16 * i)));
      found = _mm256_blendv_epi8(found, lookup16(table, low), _mm256_cmpeq_epi8(high, set(i)));
    }
    return found;
  }
  static V dot(V sum, V codes, V weights) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, weights), _mm256_set1_epi16(1)));
  }
};

// State of channel kField of every byte.
template <class S, int kField>
typename S::V state(typename S::V before, typename S::V bytes) {
  if constexpr (kField == 3) {
    return bytes;
  } else {
    constexpr int kOwn = 2 * kField + 2;
    return S::select(S::set((1 << kOwn) - 1), S::template right<8 - kOwn>(bytes), S::template left<kOwn>(before));
  }
}

struct Uniform {
  static constexpr const char* kName = "uniform";
  template <class S, int kField>
  static typename S::V read(const Tables&, typename S::V, typename S::V bytes) {
    return S::both(S::template right<2 * kField>(bytes), S::set(3));
  }
};

struct Table {
  static constexpr const char* kName = "trellis-8, table";
  template <class S, int kField>
  static typename S::V read(const Tables& t, typename S::V before, typename S::V bytes) {
    return S::lookup256(t.levels, state<S, kField>(before, bytes));
  }
};

struct Sum {
  static constexpr const char* kName = "trellis-8, sum";
  template <class S, int kField>
  static typename S::V read(const Tables& t, typename S::V before, typename S::V bytes) {
    const auto four = S::set(15), found = state<S, kField>(before, bytes);
    const auto low = S::both(found, four);
    const auto mixed = S::both(S::mix(S::template right<4>(found), S::template right<1>(found)), four);
    return S::add(S::lookup16(S::load(t.low), low), S::lookup16(S::load(t.mixed), mixed));
  }
};

template <class S, class Code, int kField>
void field(const Tables& t, typename S::V before, typename S::V bytes, const typename S::V* weights,
           typename S::V (*sums)[4], int rows) {
  const auto codes = Code::template read<S, kField>(t, before, bytes);
  for (int m = 0; m < rows; m++) sums[m][kField] = S::dot(sums[m][kField], codes, weights[m]);
}

template <class S, class Code, int kTaken>
__attribute__((noinline)) int run(const Tables& t, const uint8_t* tiles, const uint8_t* weights) {
  using V = typename S::V;
  constexpr int kStep = sizeof(V);
  V sums[kTaken][4];
  for (auto& row : sums) std::fill(row, row + 4, S::zero());
  for (int64_t at = 64; at < int64_t{kTiles} * kBytes; at += kStep) {
    const V bytes = S::load(tiles + at), before = S::load(tiles + at - 4);
    V w[kTaken];
    for (int m = 0; m < kTaken; m++) w[m] = S::load(weights + 64 * m);
    field<S, Code, 0>(t, before, bytes, w, sums, kTaken);
    field<S, Code, 1>(t, before, bytes, w, sums, kTaken);
    field<S, Code, 2>(t, before, bytes, w, sums, kTaken);
    field<S, Code, 3>(t, before, bytes, w, sums, kTaken);
  }
  alignas(64) int32_t out[16] = {};
  V all = S::zero();
  for (auto& row : sums)
    for (V& sum : row) all = S::mix(all, sum);
  __builtin_memcpy(out, &all, sizeof(all));
  int found = 0;
  for (int x : out) found ^= x;
  return found;
}

// Eight channels of a token are a 64-bit word: magnitudes by one byte, signs and shift by the other. In this order of
// bytes the eight are summed with one weight, so rows multiply what is widened, as float32 would.
template <int kTaken>
__attribute__((noinline)) int run_e8(const Tables& t, const uint8_t* tiles, const uint8_t* weights) {
  __m256i sums[kTaken] = {};
  for (int64_t at = 0; at < int64_t{kTiles} * kBytes; at += 8) {  // four words of two bytes each
    const __m128i words = _mm_cvtsi64_si128(*reinterpret_cast<const int64_t*>(tiles + at));
    const __m128i index = _mm_and_si128(words, _mm_set1_epi16(255));
    const __m256i magnitudes =
        _mm256_i64gather_epi64(reinterpret_cast<const long long*>(t.magnitudes), _mm256_cvtepu16_epi64(index), 8);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_cvtepu16_epi64(_mm_srli_epi16(words, 8)), _mm256_set1_epi64x(0));
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
    const __m256i minus = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    const __m256i codes = _mm256_sub_epi8(_mm256_xor_si256(magnitudes, minus), minus);
    for (int m = 0; m < kTaken; m++) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 64 * m));
      sums[m] = _mm256_add_epi32(sums[m],
                                 _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(codes, w)),
                                                   _mm256_set1_epi16(1)));
    }
  }
  int found = 0;
  alignas(32) int32_t out[8];
  for (auto& sum : sums) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), sum);
    for (int x : out) found ^= x;
  }
  return found;
}

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return 1e9 * static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec);
}

int sink;

template <class F>
void report(const char* set, const char* code, int rows, F call) {
  double best = 1e18;
  for (int i = 0; i < 200; i++) {
    const double begin = now();
    sink ^= call();
    best = std::min(best, now() - begin);
  }
  printf("%-8s %-18s %d query rows: %7.1f ns for a tile of 64 tokens, 128 channels\n", set, code, rows, best / kTiles);
}

template <class S, class Code>
void measure(const Tables& t, const std::vector<uint8_t>& tiles, const std::vector<uint8_t>& weights) {
  report(S::kName, Code::kName, 1, [&] { return run<S, Code, 1>(t, tiles.data(), weights.data()); });
  report(S::kName, Code::kName, kRows, [&] { return run<S, Code, kRows>(t, tiles.data(), weights.data()); });
}

template <class S>
void measure_all(const Tables& t, const std::vector<uint8_t>& tiles, const std::vector<uint8_t>& weights) {
  measure<S, Uniform>(t, tiles, weights);
  measure<S, Table>(t, tiles, weights);
  measure<S, Sum>(t, tiles, weights);
}

}  // namespace

int main() {
  Tables tables{};
  uint32_t x = 1;
  const auto random = [&] { return static_cast<uint8_t>((x = x * 1664525 + 1013904223) >> 24); };
  for (auto& level : tables.levels) level = random();
  for (int i = 0; i < 64; i++) tables.low[i] = static_cast<uint8_t>(5 * i % 16), tables.mixed[i] = 7 * i % 16;
  for (auto& m : tables.magnitudes) m = random() * 0x0101010101010101ll;
  std::vector<uint8_t> tiles(kTiles * kBytes + 64), weights(64 * kRows);
  for (auto& byte : tiles) byte = random();
  for (auto& byte : weights) byte = random() & 63;
#ifdef __AVX512VBMI__
  measure_all<Wide>(tables, tiles, weights);
#endif
  measure_all<Narrow>(tables, tiles, weights);
  report("AVX2", "e8", 1, [&] { return run_e8<1>(tables, tiles.data(), weights.data()); });
  report("AVX2", "e8", kRows, [&] { return run_e8<kRows>(tables, tiles.data(), weights.data()); });
  return sink == 42 ? 1 : 0;
}
