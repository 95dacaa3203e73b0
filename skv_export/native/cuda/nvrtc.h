// NVRTC, NVIDIA's compiler as a library, found where it is at run time.
#pragma once
#include <string>
#include <vector>

namespace skv::cuda {

// Which library it is, such as "NVRTC 13.5 (/usr/lib/libnvrtc.so.13)"; empty where there is none.
const std::string& nvrtc_name();

// Compiles a program of the library's sources (kernel_sources.h) for a compute capability such as 90, or where NVRTC is
// older than the card, for an older one that the card can run. Empty: it failed, and `problem` says why.
std::vector<char> nvrtc_compile(const std::string& program, int architecture, std::string& problem);

// The options, but for the architecture: they are part of what a result depends on.
const std::vector<std::string>& nvrtc_options();

}  // namespace skv::cuda
