// The instances of decode_mma for head_dim 256.
#define SKV_MMA_DIM 256
#include "mma_instances.cuh"

namespace skv::cuda {

MmaTable decode_mma_256() { return {kInstances, sizeof kInstances / sizeof *kInstances}; }

}  // namespace skv::cuda
