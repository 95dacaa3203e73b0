// Kernels of decode_mma that are not built in: compiled by NVRTC from the library's own sources, and kept in a folder
// of this machine's user. Compiles for any card, with or without one.
#pragma once
#include <string>
#include <vector>

#include "mma_form.h"

namespace skv::cuda {

// A form's kernels for an architecture (90 = sm_90).
struct Cubin {
  std::vector<char> code;  // empty: there are none
  std::string origin;      // where they come from, or why there are none, and what to do
  std::string not_kept;    // why they were compiled and could not be kept; else empty
  bool is_from_cache = false;
};

// From the cache folder, else compiled. `anew`: what is kept there is not good.
Cubin make_cubin(const MmaForm& form, int architecture, bool anew = false);

// What make_cubin would do, in words and as an SkvCudaOrigin; architecture 0: whichever the card will have.
std::string cubin_origin(const MmaForm& form, int architecture, int& origin);

// Such as "K8V3 D128, keys channel, values token".
std::string text_of(const MmaForm& form);

// A kernel's name in the cubin.
std::string kernel_name(const MmaForm& form, int blocks);

}  // namespace skv::cuda
