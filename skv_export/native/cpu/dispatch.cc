// Chooses the unit: the best instruction set that the processor and the system support, or a lesser one set by
// SKV_CPU_ISA.
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
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
// What the processor has (cpuid), and of whose registers the system keeps the contents (xgetbv): Intel's manual, volume
// 1, 14.3 and 15.2. The compilers' own __builtin_cpu_supports is not everywhere: zig's always says no.
struct Processor {
  bool avx2 = false, avxvnni = false, avx512vnni = false;

  Processor() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    constexpr unsigned kFma = 1u << 12, kXgetbv = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
    constexpr unsigned kNeeded = kFma | kXgetbv | kAvx | kF16c;
    if ((c & kNeeded) != kNeeded) return;
    unsigned kept = 0, high = 0;
    __asm__("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
    constexpr unsigned kYmm = 0x06, kZmm = 0xe6;
    if ((kept & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    constexpr unsigned kAvx2 = 1u << 5, kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    constexpr unsigned kVnni = 1u << 11;
    avx2 = (b & kAvx2) != 0;
    avx512vnni = avx2 && (kept & kZmm) == kZmm && (b & kAvx512) == kAvx512 && (c & kVnni) != 0;
    avxvnni = avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1) != 0;
  }
};

const Processor& processor() {
  static const Processor found;
  return found;
}

bool has_avx2() { return processor().avx2; }
bool has_avxvnni() { return processor().avxvnni; }
bool has_avx512vnni() { return processor().avx512vnni; }
#elif defined(__aarch64__) && defined(__linux__)
bool has_dot_product() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#elif defined(__aarch64__)
bool has_dot_product() { return true; }  // all of Apple's processors for macOS
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
