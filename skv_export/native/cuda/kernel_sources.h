// The sources of decode_mma as text.
#pragma once
#include <cstddef>

namespace skv::cuda {

struct SourceText {
  const char* name;  // as it is included
  const char* text;
};
extern const SourceText kKernelSources[];
extern const size_t kKernelSourceCount;

}  // namespace skv::cuda
