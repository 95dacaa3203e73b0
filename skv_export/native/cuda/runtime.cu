// Access to the CUDA runtime for the kernels' callers: whether a device can run them, a flag that device and host
// share, copies. Contains no kernels, so any C++ compiler can compile it.
#include <cuda_runtime_api.h>

#include <cstdio>

#include "errors.h"
#include "kernels_cuda.h"
#include "runtime.h"

namespace {

constexpr int kLeastArchitecture = 80;

int failed(const char* what, cudaError_t error, const char* fix) {
  return skv::cuda::fail(SKV_NOT_SUPPORTED, "CUDA: %s; got %s; expected a usable NVIDIA GPU and driver. %s", what,
                         cudaGetErrorString(error), fix);
}

}  // namespace

namespace skv::cuda {

int load_kernels(const void* cubin, int count, const char* const* names, const void** kernels) {
  cudaLibrary_t library = nullptr;
  cudaError_t error = cudaLibraryLoadData(&library, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);
  for (int i = 0; i < count && error == cudaSuccess; i++) {
    cudaKernel_t kernel = nullptr;
    error = cudaLibraryGetKernel(&kernel, library, names[i]);
    kernels[i] = kernel;  // the runtime takes one where it takes a function of the program
  }
  if (error == cudaSuccess) return SKV_OK;
  cudaGetLastError();  // it would be the next launch's
  if (library) cudaLibraryUnload(library);
  return fail(SKV_RUNTIME_ERROR, "CUDA: a compiled kernel can't be loaded; got %s", cudaGetErrorString(error));
}

int make_ready(const void* kernel, int shared_bytes) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) return SKV_OK;
  cudaGetLastError();
  return fail(SKV_RUNTIME_ERROR, "CUDA: a compiled kernel does not run on this device; got %s",
              cudaGetErrorString(error));
}

}  // namespace skv::cuda

int skv_cuda_device(int32_t* multiprocessors, int32_t* architecture) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) {
    return failed("no device", error,
                  "Install a driver for CUDA 13 (580 or newer), or use the cpu execution provider.");
  }
  error = cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return failed("device attributes", error, "Check nvidia-smi.");
  *architecture = 10 * major + minor;
  if (*architecture < kLeastArchitecture) {
    return skv::cuda::fail(SKV_NOT_SUPPORTED,
                           "CUDA: device %d; got compute capability %d.%d; expected 8.0 or newer (Ampere). Use the cpu "
                           "execution provider.",
                           device, major, minor);
  }
  if (skv::cuda::code_for_device() == 0) return SKV_OK;
  cudaGetLastError();  // it would be the next launch's
  return skv::cuda::fail(SKV_NOT_SUPPORTED,
                         "CUDA: device %d; got compute capability %d.%d; expected one that this build has code for. "
                         "Build it with -DSKV_CUDA_ARCHITECTURES=%d.",
                         device, major, minor, *architecture);
}

int skv_cuda_use_device(int32_t device) {
  const cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? SKV_OK : failed("no such device", error, "Check nvidia-smi.");
}

int skv_cuda_flag_create(int32_t** flag) {
  void* memory = nullptr;
  const cudaError_t error = cudaHostAlloc(&memory, sizeof(int32_t), cudaHostAllocMapped | cudaHostAllocPortable);
  if (error != cudaSuccess) return failed("pinned memory", error, "Check nvidia-smi.");
  *flag = static_cast<int32_t*>(memory);
  **flag = 0;
  return SKV_OK;
}

void skv_cuda_flag_destroy(int32_t* flag) { cudaFreeHost(flag); }

int skv_cuda_synchronize(void* stream) {
  const cudaError_t error = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return SKV_OK;
  return skv::cuda::fail(SKV_RUNTIME_ERROR, "CUDA: a kernel failed; got %s", cudaGetErrorString(error));
}

int skv_cuda_set_column(void* first, int64_t row_bytes, int32_t rows, void* stream) {
  // The lowest byte of each, as numbers stand in memory here.
  const cudaError_t error =
      cudaMemset2DAsync(first, size_t(row_bytes), 1, 1, size_t(rows), static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return SKV_OK;
  return skv::cuda::fail(SKV_RUNTIME_ERROR, "CUDA: a column of %d rows; got %s", rows, cudaGetErrorString(error));
}

int skv_cuda_copy(void* to, const void* from, int64_t bytes, void* stream) {
  const cudaError_t error =
      cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return SKV_OK;
  return skv::cuda::fail(SKV_RUNTIME_ERROR, "CUDA: copy of %lld bytes failed; got %s", static_cast<long long>(bytes),
                         cudaGetErrorString(error));
}
