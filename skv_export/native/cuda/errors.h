// Owns what the kernels' files and the one without kernels (runtime.cu) share: how a reason is left behind for
// skv_cuda_last_error, and whether there is code for the device.
#pragma once

namespace skv::cuda {

// Keeps the formatted reason for the calling thread; returns the status.
__attribute__((format(printf, 2, 3))) int fail(int status, const char* format, ...);

// A cudaError_t; 0 where the current device can run the library's kernels.
int code_for_device();

}  // namespace skv::cuda
