// The kernels of decode_mma for head_dim 64 that are built in.
#include "mma_instances.cuh"

namespace skv::cuda {

MmaTable decode_mma_64() { return built_in<64>(); }

}  // namespace skv::cuda
