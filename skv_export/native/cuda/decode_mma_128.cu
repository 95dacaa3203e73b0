// The kernels of decode_mma for head_dim 128 that are built in.
#include "mma_instances.cuh"

namespace skv::cuda {

MmaTable decode_mma_128() { return built_in<128>(); }

}  // namespace skv::cuda
