// The sizes of an instance of decode_mma, and the part of a sequence that each of its blocks works on.
#pragma once
#include "codes.cuh"
#include "launchers.h"

namespace skv::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Warps that a multiprocessor's shared memory has room for, at the default layout.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kResidentWarps = 8;
#else
constexpr int kResidentWarps = 16;
#endif
constexpr int kSlab = 32;  // tokens that a warp copies and works on at once

// Sizes of one instance.
template <int D_, int KBits_, int VBits_, bool KPerToken_, bool VPerChannel_, int Blocks_>
struct MmaShape {
  static constexpr int D = D_, KBits = KBits_, VBits = VBits_, Blocks = Blocks_;
  static constexpr bool KPerToken = KPerToken_, VPerChannel = VPerChannel_;
  static constexpr int kChunks = D / 64, kColumns = 8 * Blocks, E = D / 32;
  using K = Codes<KBits>;
  using V = Codes<VBits>;
  using Order = KeyOrder<KBits>;

  // A slab in shared memory; scales per token have room for a tile's means behind them.
  static constexpr int kScales = 64 * kChunks, kMeans = D + 16;
  static constexpr int kKeyParameters = 4 * D * KBits;
  static constexpr int kValueCodes = kKeyParameters + (KPerToken ? kScales + kMeans : 4 * D);
  static constexpr int kValueParameters = kValueCodes + 4 * D * VBits;
  static constexpr int kStage = kValueParameters + (VPerChannel ? 4 * D : kScales + kMeans);
  static constexpr int kStages = 2;  // a slab takes longer than its copy; and two blocks fit in 100 KiB
  static constexpr int kWarpCount = 4 * kStages * kStage <= 80 * 1024 ? 4 : 2;
  static constexpr int kThreadCount = 32 * kWarpCount;
  // Blocks that a multiprocessor's registers must hold: of 16 warps (128 registers a thread) where they suffice, else 8
  // (255).
  static constexpr bool kManyRegisters =
      D > 128 || Blocks > 1 || VPerChannel || (D == 128 && (KBits != 4 || VBits == 3));
  static constexpr int kMinBlocks = (kManyRegisters ? 8 : kResidentWarps) / kWarpCount;

  // Shared memory: queries, new rows, each warp's means of the scores, then the slabs, whose place the warps' results
  // take at the end.
  static constexpr int kQueryStride = D + 8;  // halves; the 16 bytes keep rows off each other's banks
  static constexpr int kNewRows = kColumns * kQueryStride * 2;
  static constexpr int kMaxNew = 8;
  static constexpr int kMeanScores = kNewRows + 2 * kMaxNew * D * 2;
  static constexpr int kSlabs = kMeanScores + (KPerToken ? kWarpCount * kColumns * 4 : 0);
  static constexpr int kSlabBytes = kWarpCount * kStages * kStage;
  static constexpr int kMergeBytes = kWarpCount * kColumns * (D + 2) * 4;
  static constexpr int kShared = kSlabs + (kSlabBytes > kMergeBytes ? kSlabBytes : kMergeBytes);
};

// Which part of a sequence a block works on; the same for all its threads.
struct Work {
  Sequence s;
  int first_tile, tile_pieces;  // pieces: tiles first, then 32 exact rows each
  int in_tiles, exact;          // tokens
  int begin, end;               // pieces of this block

  SKV_DEVICE Work(const Attention& a, int b, int warps) : s(sequence(a.lengths, b, a.key, a.value)) {
    const SkvLayout& l = a.key.layout;
    const int low = a.window > 0 && s.past + 1 > a.window ? s.past + 1 - a.window : 0;
    in_tiles = quantized(l, s.past);
    const int tiles = in_tiles / l.tile_tokens,
              seen = low > l.num_sink_tokens ? (low - l.num_sink_tokens) / l.tile_tokens : 0;
    first_tile = seen < tiles ? seen : tiles;
    tile_pieces = tiles - first_tile;
    exact = s.past - in_tiles + s.fresh;
    const int pieces = s.valid && s.fresh > 0 ? tile_pieces + (exact + kSlab - 1) / kSlab : 0;
    // In whole rounds of a block's warps: where there are few pieces, few blocks have all of them.
    const int rounds = (pieces + a.splits * warps - 1) / (a.splits * warps), share = rounds * warps;
    begin = blockIdx.x * share;
    end = begin + share < pieces ? begin + share : pieces;
  }
  SKV_DEVICE int position(const SkvLayout& l, int exact_index) const {
    return exact_index < l.num_sink_tokens ? exact_index : exact_index + in_tiles;
  }
};

}  // namespace skv::cuda
