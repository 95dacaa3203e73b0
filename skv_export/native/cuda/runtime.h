// What runtime.cu has for the others: kernels that are not built in.
#pragma once

namespace skv::cuda {

// Kernels of a cubin by their names in it, to be launched as those that are built in are; they stay loaded. Returns an
// SkvStatus, and leaves the reason in skv_cuda_last_error.
int load_kernels(const void* cubin, int count, const char* const* names, const void** kernels);

// Loads such a kernel onto the current device, as a launch may be captured in a graph and must not have to.
int make_ready(const void* kernel, int shared_bytes);

}  // namespace skv::cuda
