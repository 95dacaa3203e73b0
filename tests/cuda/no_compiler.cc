// What shims have for cuda/compiler.cc and the part of cuda/runtime.cu that loads: only what is built in is there.
#include "cuda/compiler.h"
#include "cuda/kernels_cuda.h"
#include "cuda/runtime.h"

namespace skv::cuda {

Cubin make_cubin(const MmaForm&, int, bool) { return {{}, "nothing is compiled here.", "", false}; }
std::string cubin_origin(const MmaForm&, int, int& origin) {
  origin = SKV_CUDA_MISSING;
  return "nothing is compiled here.";
}
std::string text_of(const MmaForm&) { return "of another form"; }
std::string kernel_name(const MmaForm&, int) { return ""; }
int load_kernels(const void*, int, const char* const*, const void**) { return SKV_NOT_SUPPORTED; }
int make_ready(const void*, int) { return SKV_NOT_SUPPORTED; }

}  // namespace skv::cuda
