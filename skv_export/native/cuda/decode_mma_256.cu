// The kernels of decode_mma for head_dim 256 that are built in.
#include "mma_instances.cuh"

namespace skv::cuda {

MmaTable decode_mma_256() { return built_in<256>(); }

}  // namespace skv::cuda
