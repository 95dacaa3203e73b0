// What a kernel of decode_mma is compiled for, and the sizes that follow from it.
#pragma once
#include "../kv_layout.h"

namespace skv::cuda {

struct MmaForm {
  int32_t dim, k_bits, v_bits;
  bool k_per_token, v_per_channel;
};
SKV_HD bool operator==(const MmaForm& a, const MmaForm& b) {
  return a.dim == b.dim && a.k_bits == b.k_bits && a.v_bits == b.v_bits && a.k_per_token == b.k_per_token &&
         a.v_per_channel == b.v_per_channel;
}

SKV_HD bool has_mma_codes(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

// Blocks of 8 columns of queries that a form's widest kernel has; 0 = the form has no kernel. What was seen to spill
// registers on some architecture is left out: two blocks of 8 bits or of head_dim 256, and, at head_dim 256, keys per
// token with 3-bit values per channel.
SKV_HD int mma_blocks(const MmaForm& f) {
  const bool is_known =
      (f.dim == 64 || f.dim == 128 || f.dim == 256) && has_mma_codes(f.k_bits) && has_mma_codes(f.v_bits);
  if (!is_known || (f.dim == 256 && f.k_per_token && f.v_per_channel && f.v_bits == 3)) return 0;
  return f.dim < 256 && f.k_bits < 8 && f.v_bits < 8 && !f.k_per_token && !f.v_per_channel ? 2 : 1;
}

// Of a kernel of so many blocks of columns. Bytes of shared memory: queries, new rows, each warp's means of the scores,
// then the slabs, whose place the warps' results take at the end.
struct MmaSizes {
  static constexpr int kStages = 2;  // a slab takes longer than its copy; and two blocks fit in 100 KiB
  static constexpr int kMaxNew = 8;

  // A slab; scales per token have room for a tile's means behind them.
  int scales, means, key_parameters, value_codes, value_parameters, stage;
  int warps;
  int query_stride;  // halves; the 16 bytes keep rows off each other's banks
  int new_rows, mean_scores, slabs, shared;

  SKV_HD MmaSizes(const MmaForm& f, int blocks)
      : scales(f.dim),
        means(f.dim + 16),
        key_parameters(4 * f.dim * f.k_bits),
        value_codes(key_parameters + (f.k_per_token ? scales + means : 4 * f.dim)),
        value_parameters(value_codes + 4 * f.dim * f.v_bits),
        stage(value_parameters + (f.v_per_channel ? 4 * f.dim : scales + means)),
        warps(4 * kStages * stage <= 80 * 1024 ? 4 : 2),
        query_stride(f.dim + 8),
        new_rows(8 * blocks * query_stride * 2),
        mean_scores(new_rows + 2 * kMaxNew * f.dim * 2),
        slabs(mean_scores + (f.k_per_token ? warps * 8 * blocks * 4 : 0)),
        shared(slabs + larger(warps * kStages * stage, warps * 8 * blocks * (f.dim + 2) * 4)) {}

 private:
  static SKV_HD int larger(int a, int b) { return a > b ? a : b; }
};

// Of an architecture, ten times the compute capability: bytes of shared memory that a multiprocessor has for blocks,
// each of which takes one KiB more than it asks for.
SKV_HD int shared_of(int architecture) {
  const bool is_small = architecture == 86 || architecture == 89 || architecture >= 120;
  return (is_small ? 100 : architecture < 90 ? 164 : 228) * 1024;
}
// Warps of a kernel that a multiprocessor's registers are to hold: 16 of 128 registers a thread, or where a kernel
// would spill, or shared memory has no room for more, 8 of 255.
SKV_HD int warps_by_registers(const MmaForm& f, int blocks, int architecture) {
  const bool is_wide = f.k_bits > 4 || f.v_bits == 3 || (f.k_bits == 3 && architecture < 90);
  const bool spills = f.dim > 128 || blocks > 1 || f.v_per_channel || (f.dim == 128 && is_wide);
  return spills || shared_of(architecture) < 128 * 1024 ? 8 : 16;
}
// Blocks of threads that a multiprocessor holds at a time.
SKV_HD int resident_blocks(const MmaForm& f, int blocks, int architecture) {
  const MmaSizes sizes(f, blocks);
  const int by_registers = warps_by_registers(f, blocks, architecture) / sizes.warps;
  const int by_shared = shared_of(architecture) / (sizes.shared + 1024);
  return by_registers < by_shared ? by_registers : by_shared;
}

}  // namespace skv::cuda
