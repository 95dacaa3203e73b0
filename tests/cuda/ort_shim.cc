// The rest of the op's library in tests of its CUDA side on the shim. It replaces cpu/dispatch.cc; and, without a CUDA
// provider, cuda/runtime.cu (on host memory) and ort/kernel_cpu.cc: it registers what ort/kernel_cuda.cc defines for
// the CPU provider (built with SKV_CUDA_PROVIDER set).
#include <cstdlib>
#include <cstring>

#include "cpu/isa.h"
#include "cuda/kernels_cuda.h"
#include "ort/op.h"

const skv::Unit& skv::unit() { return kUnitScalar; }
extern "C" const char* skv_cpu_isa(void) { return skv::unit().name; }
extern "C" const char* skv_version(void) { return "shim"; }
extern "C" const char* skv_cuda_build(void) { return "shim"; }

#if !defined(SKV_WITH_CUDA)

int skv_cuda_device(int32_t* multiprocessors, int32_t* architecture) {
  *multiprocessors = 4;
  const char* major = std::getenv("SKV_SHIM_MAJOR");
  *architecture = major ? 10 * std::atoi(major) : 80;
  return SKV_OK;
}
int skv_cuda_use_device(int32_t) { return SKV_OK; }
int skv_cuda_flag_create(int32_t** flag) {
  *flag = new int32_t(0);
  return SKV_OK;
}
void skv_cuda_flag_destroy(int32_t* flag) { delete flag; }
int skv_cuda_copy(void* to, const void* from, int64_t bytes, void*) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
  return SKV_OK;
}
int skv_cuda_synchronize(void*) { return SKV_OK; }

extern "C" SKV_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const skv::ort::ApiBase* base) {
  using namespace skv::ort;
  if (OrtStatus* status = load_api(base)) return status;
  return guarded([&] {
    static OrtCustomOpDomain* domain = nullptr;
    if (domain == nullptr) {
      check(api().CreateCustomOpDomain("skv", &domain));
      for (const Definition* definition : cuda_definitions()) check(api().CustomOpDomain_Add(domain, definition));
    }
    check(api().AddCustomOpDomain(options, domain));
  });
}

#endif
