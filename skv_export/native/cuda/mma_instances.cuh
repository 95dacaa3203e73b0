// Owns the table of instances of decode_mma: included once per head_dim (decode_mma_64.cu ...), with SKV_MMA_DIM set.
//
// Every pair of bits comes in four forms (keys per channel or token, values per token or channel), for 8 columns of
// queries; the default form also, where registers allow, for 16. SKV_CUDA_FEW leaves all but the default bits out, for
// quick checks.
#pragma once
#include "decode_mma.cuh"

#ifdef SKV_CUDA_FEW
#define SKV_MMA_PAIRS(X) X(4, 2)
#else
#define SKV_MMA_PAIRS(X) X(8, 8) X(4, 4) X(4, 3) X(4, 2) X(3, 3) X(3, 2) X(2, 2)
#endif

namespace skv::cuda {

template <class S>
constexpr MmaInstance instance() {
  return {S::D,        S::KBits,        S::VBits,   S::KPerToken,         S::VPerChannel,
          S::kColumns, S::kThreadCount, S::kShared, &decode_mma_kernel<S>};
}

#define SKV_MMA_FORM(K, V, KPerToken, VPerChannel, Blocks) \
  instance<MmaShape<SKV_MMA_DIM, K, V, KPerToken, VPerChannel, Blocks>>(),
#if SKV_MMA_DIM <= 128
#define SKV_MMA_WIDE(K, V) SKV_MMA_FORM(K, V, false, false, 2)
#else
#define SKV_MMA_WIDE(K, V)
#endif
#define SKV_MMA_FORMS(K, V)           \
  SKV_MMA_FORM(K, V, false, false, 1) \
  SKV_MMA_WIDE(K, V)                  \
  SKV_MMA_FORM(K, V, true, false, 1) SKV_MMA_FORM(K, V, false, true, 1) SKV_MMA_FORM(K, V, true, true, 1)

constexpr MmaInstance kInstances[] = {SKV_MMA_PAIRS(SKV_MMA_FORMS)};

}  // namespace skv::cuda
