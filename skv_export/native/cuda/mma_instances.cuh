// The kernels of decode_mma that are built in; included once per head_dim (decode_mma_64.cu ...).
//
// They are those of the recipes' bits in the default form, keys per channel and values per token. All other forms that
// mma_form.h knows are compiled where they are needed (compiler.h). SKV_CUDA_ALL builds four forms of these and more
// bits in; SKV_CUDA_FEW four forms of the default bits, for quick checks.
#pragma once
#include <vector>

#include "decode_mma.cuh"
#include "launchers.h"

namespace skv::cuda {

template <int K, int V>
struct Bits {};
template <class... Pairs>
struct BitPairs {};

#if defined(SKV_CUDA_FEW)
using BuiltIn = BitPairs<Bits<4, 2>>;
constexpr bool kFourForms = true;
#elif defined(SKV_CUDA_ALL)
using BuiltIn = BitPairs<Bits<8, 8>, Bits<4, 4>, Bits<4, 3>, Bits<4, 2>, Bits<3, 3>, Bits<3, 2>, Bits<2, 2>>;
constexpr bool kFourForms = true;
#else
using BuiltIn = BitPairs<Bits<4, 4>, Bits<4, 2>, Bits<3, 2>, Bits<2, 2>>;
constexpr bool kFourForms = false;
#endif

template <class S>
MmaInstance instance() {
  return {S::kForm, S::kColumns, S::kThreadCount, S::kShared, &decode_mma_kernel<S>};
}

template <int D, int K, int V, bool KPerToken, bool VPerChannel>
void add_form(std::vector<MmaInstance>& to) {
  constexpr int kBlocks = mma_blocks({D, K, V, KPerToken, VPerChannel});
  if constexpr (kBlocks >= 1) to.push_back(instance<MmaShape<D, K, V, KPerToken, VPerChannel, 1>>());
  if constexpr (kBlocks >= 2) to.push_back(instance<MmaShape<D, K, V, KPerToken, VPerChannel, 2>>());
}

template <int D, int K, int V>
void add(std::vector<MmaInstance>& to, Bits<K, V>) {
  if constexpr (D <= 128 || kFourForms) add_form<D, K, V, false, false>(to);
  if constexpr (kFourForms) {
    add_form<D, K, V, true, false>(to);
    add_form<D, K, V, false, true>(to);
    add_form<D, K, V, true, true>(to);
  }
}

template <int D, class... Pairs>
std::vector<MmaInstance> all_instances(BitPairs<Pairs...>) {
  std::vector<MmaInstance> all;
  (add<D>(all, Pairs()), ...);
  return all;
}

template <int D>
MmaTable built_in() {
  static const std::vector<MmaInstance> all = all_instances<D>(BuiltIn());
  return {all.data(), all.size()};
}

}  // namespace skv::cuda
