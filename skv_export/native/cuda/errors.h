// Owns how the CUDA side leaves a reason behind: skv_cuda_last_error.
#pragma once

namespace skv::cuda {

// Keeps the formatted reason for the calling thread; returns the status.
__attribute__((format(printf, 2, 3))) int fail(int status, const char* format, ...);

}  // namespace skv::cuda
