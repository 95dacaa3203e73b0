// The instances of decode_mma for head_dim 64.
#define SKV_MMA_DIM 64
#include "mma_instances.cuh"

namespace skv::cuda {

MmaTable decode_mma_64() { return {kInstances, sizeof kInstances / sizeof *kInstances}; }

}  // namespace skv::cuda
