// The part of cuda/runtime.cu that loads, for a shim without runtime_shim.cc.
#include "cuda/errors.h"
#include "cuda/kernels_cuda.h"
#include "cuda/runtime.h"
#include "runtime_library.h"

namespace skv::cuda {

int load_kernels(const void* cubin, int count, const char* const* names, const void** kernels) {
  const shim::CudaLibrary* library = shim::read_cubin(cubin);
  for (int i = 0; library && i < count; i++) kernels[i] = shim::kernel_of(*library, names[i]);
  const bool all = library && kernels[0] && kernels[count - 1];
  return all ? SKV_OK : fail(SKV_RUNTIME_ERROR, "the cubin has no such kernel, or nothing was provided for it");
}
int make_ready(const void*, int) { return SKV_OK; }

}  // namespace skv::cuda
