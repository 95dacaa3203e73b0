// The instances of decode_mma for head_dim 128.
#define SKV_MMA_DIM 128
#include "mma_instances.cuh"

namespace skv::cuda {

MmaTable decode_mma_128() { return {kInstances, sizeof kInstances / sizeof *kInstances}; }

}  // namespace skv::cuda
