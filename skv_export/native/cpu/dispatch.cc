// Chooses the unit: the best instruction set that the processor and the system support, or a lesser one set by
// SKV_CPU_ISA.
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "cpu/isa.h"
#include "kernels.h"

#ifndef SKV_CUDA_BUILD
#define SKV_CUDA_BUILD ""
#endif

namespace skv {
namespace {

struct Candidate {
  const Unit* unit;
  bool (*runs_here)();
};

#if defined(__x86_64__)
// The compiler's runtime asks cpuid, and the system (xgetbv) for the registers it keeps.
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;  // leaf 7, subleaf 1: __builtin_cpu_supports of older compilers lacks it
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1) != 0;
}

bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
bool has_dot_product() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kUnitAvx512, has_avx512vnni},
    {&kUnitAvxVnni, has_avxvnni},
    {&kUnitAvx2, has_avx2},
#elif defined(__aarch64__)
    {&kUnitNeon, has_dot_product},
#endif
    {&kUnitScalar, [] { return true; }},
};

const Unit& choose() {
  const char* wanted = getenv("SKV_CPU_ISA");
  for (const Candidate& candidate : kCandidates) {
    if (wanted && *wanted && strcmp(wanted, candidate.unit->name) != 0) continue;
    if (candidate.runs_here()) return *candidate.unit;
  }
  // What was named is not known or not here: the best there is, as if nothing had been named.
  for (const Candidate& candidate : kCandidates) {
    if (candidate.runs_here()) return *candidate.unit;
  }
  return kUnitScalar;
}

}  // namespace

const Unit& unit() {
  static const Unit& chosen = choose();
  return chosen;
}

}  // namespace skv

extern "C" const char* skv_cpu_isa(void) { return skv::unit().name; }
extern "C" const char* skv_version(void) { return SKV_VERSION; }
extern "C" const char* skv_cuda_build(void) { return SKV_CUDA_BUILD; }
