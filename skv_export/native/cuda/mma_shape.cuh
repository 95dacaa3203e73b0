// The constants of a kernel of decode_mma, and the part of a sequence that each of its blocks works on.
#pragma once
#include "attention.cuh"
#include "codes.cuh"
#include "mma_form.h"

namespace skv::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
#ifdef __CUDA_ARCH__
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 80;
#endif
constexpr int kSlab = 32;  // tokens that a warp copies and works on at once

// Of one kernel.
template <int D_, int KBits_, int VBits_, bool KPerToken_, bool VPerChannel_, int Blocks_>
struct MmaShape {
  static constexpr int D = D_, KBits = KBits_, VBits = VBits_, Blocks = Blocks_;
  static constexpr bool KPerToken = KPerToken_, VPerChannel = VPerChannel_;
  static constexpr int kChunks = D / 64, kColumns = 8 * Blocks, E = D / 32;
  using K = Codes<KBits>;
  using V = Codes<VBits>;
  using Order = KeyOrder<KBits>;

  static constexpr MmaForm kForm{D, KBits, VBits, KPerToken, VPerChannel};
  static constexpr MmaSizes kSizes{kForm, Blocks};
  static constexpr int kScales = kSizes.scales, kMeans = kSizes.means, kKeyParameters = kSizes.key_parameters,
                       kValueCodes = kSizes.value_codes, kValueParameters = kSizes.value_parameters,
                       kStage = kSizes.stage, kStages = MmaSizes::kStages, kMaxNew = MmaSizes::kMaxNew,
                       kQueryStride = kSizes.query_stride, kNewRows = kSizes.new_rows, kMeanScores = kSizes.mean_scores,
                       kSlabs = kSizes.slabs, kShared = kSizes.shared;
  static constexpr int kWarpCount = kSizes.warps, kThreadCount = 32 * kWarpCount;
  static constexpr int kMinBlocks = warps_by_registers(kForm, Blocks, kArchitecture) / kWarpCount;
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
