// The table of instances of decode_mma: included once per head_dim (decode_mma_64.cu ...), with SKV_MMA_DIM set.
//
// Every pair of bits comes in four forms (keys per channel or token, values per token or channel), for 8 columns of
// queries; the default form also for 16. What would spill registers on some architecture is left out: 16 columns of 8
// bits or of head_dim 256 (two blocks of 8 instead), and, at head_dim 256, keys per token with 3-bit values per channel
// (decode_simple). SKV_CUDA_FEW leaves all but the default bits out, for quick checks.
#pragma once
#include "decode_mma.cuh"

// clang-format off
#ifdef SKV_CUDA_FEW
#define SKV_MMA_PAIRS(X) X(4, 2, SKV_MMA_WIDE, SKV_MMA_LAST)
#else
#define SKV_MMA_PAIRS(X)                 \
  X(8, 8, SKV_MMA_NONE, SKV_MMA_LAST)   \
  X(4, 4, SKV_MMA_WIDE, SKV_MMA_LAST)   \
  X(4, 3, SKV_MMA_WIDE, SKV_MMA_LAST_3) \
  X(4, 2, SKV_MMA_WIDE, SKV_MMA_LAST)   \
  X(3, 3, SKV_MMA_WIDE, SKV_MMA_LAST_3) \
  X(3, 2, SKV_MMA_WIDE, SKV_MMA_LAST)   \
  X(2, 2, SKV_MMA_WIDE, SKV_MMA_LAST)
#endif
// clang-format on

namespace skv::cuda {

template <class S>
constexpr MmaInstance instance() {
  return {S::D,        S::KBits,        S::VBits,   S::KPerToken,         S::VPerChannel,
          S::kColumns, S::kThreadCount, S::kShared, &decode_mma_kernel<S>};
}

// clang-format off
#define SKV_MMA_FORM(K, V, KPerToken, VPerChannel, Blocks) \
  instance<MmaShape<SKV_MMA_DIM, K, V, KPerToken, VPerChannel, Blocks>>(),
#define SKV_MMA_NONE(K, V)
#define SKV_MMA_LAST(K, V) SKV_MMA_FORM(K, V, true, true, 1)
#if SKV_MMA_DIM <= 128
#define SKV_MMA_WIDE(K, V) SKV_MMA_FORM(K, V, false, false, 2)
#define SKV_MMA_LAST_3 SKV_MMA_LAST
#else
#define SKV_MMA_WIDE SKV_MMA_NONE
#define SKV_MMA_LAST_3 SKV_MMA_NONE
#endif
#define SKV_MMA_FORMS(K, V, Wide, Last)                                  \
  SKV_MMA_FORM(K, V, false, false, 1) SKV_MMA_FORM(K, V, true, false, 1) \
  SKV_MMA_FORM(K, V, false, true, 1) Wide(K, V) Last(K, V)
// clang-format on

constexpr MmaInstance kInstances[] = {SKV_MMA_PAIRS(SKV_MMA_FORMS)};

}  // namespace skv::cuda
