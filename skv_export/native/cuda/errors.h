// Errors, for the files with kernels and the one without (runtime.cu): sets the message of skv_cuda_last_error, and
// checks that there is code for the device.
#pragma once

namespace skv::cuda {

// Keeps the formatted reason for the calling thread; returns the status.
__attribute__((format(printf, 2, 3))) int fail(int status, const char* format, ...);

// A cudaError_t; 0 where the current device can run the library's kernels.
int code_for_device();

}  // namespace skv::cuda
