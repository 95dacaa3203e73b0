// For runtime_shim.cc: some forms of decode_mma that are not built in, as g++ builds them. The library under test
// compiles their cubins with NVRTC; what is launched is the kernel here that has the name of the one asked for.
#include "cuda/compiler.h"
#include "cuda/decode_mma.cuh"

extern "C" void skv_shim_provide(const char* name, const void* kernel);

namespace skv::cuda {
namespace {

template <class S>
void provide() {
  skv_shim_provide(kernel_name(S::kForm, S::Blocks).c_str(), reinterpret_cast<const void*>(&decode_mma_kernel<S>));
}

const bool provided = [] {
  provide<MmaShape<64, 8, 8, true, false, 1>>();
  provide<MmaShape<64, 2, 4, false, false, 1>>();
  provide<MmaShape<64, 2, 4, false, false, 2>>();
  return true;
}();

}  // namespace
}  // namespace skv::cuda
