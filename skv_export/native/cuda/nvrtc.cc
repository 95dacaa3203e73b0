#include "nvrtc.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <type_traits>

#include "kernel_sources.h"

namespace skv::cuda {
namespace {

constexpr int kMajors[] = {13, 12};  // of libraries that are looked for, in this order

// The part of its interface that is used.
struct Nvrtc {
  using Program = struct Opaque*;

  int (*nvrtcVersion)(int* major, int* minor);
  int (*nvrtcGetNumSupportedArchs)(int* count);
  int (*nvrtcGetSupportedArchs)(int* architectures);
  int (*nvrtcCreateProgram)(Program*, const char* source, const char* name, int count, const char* const* headers,
                            const char* const* names);
  int (*nvrtcCompileProgram)(Program, int count, const char* const* options);
  int (*nvrtcDestroyProgram)(Program*);
  int (*nvrtcGetProgramLogSize)(Program, size_t*);
  int (*nvrtcGetProgramLog)(Program, char*);
  int (*nvrtcGetCUBINSize)(Program, size_t*);
  int (*nvrtcGetCUBIN)(Program, char*);
  std::string name;
};

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool read_interface(void* library, Nvrtc& n) {
  return find(library, "nvrtcVersion", n.nvrtcVersion) &&
         find(library, "nvrtcGetNumSupportedArchs", n.nvrtcGetNumSupportedArchs) &&
         find(library, "nvrtcGetSupportedArchs", n.nvrtcGetSupportedArchs) &&
         find(library, "nvrtcCreateProgram", n.nvrtcCreateProgram) &&
         find(library, "nvrtcCompileProgram", n.nvrtcCompileProgram) &&
         find(library, "nvrtcDestroyProgram", n.nvrtcDestroyProgram) &&
         find(library, "nvrtcGetProgramLogSize", n.nvrtcGetProgramLogSize) &&
         find(library, "nvrtcGetProgramLog", n.nvrtcGetProgramLog) &&
         find(library, "nvrtcGetCUBINSize", n.nvrtcGetCUBINSize) && find(library, "nvrtcGetCUBIN", n.nvrtcGetCUBIN);
}

// Where it may be (docs/gpu.md): what SKV_NVRTC names, and nothing else then; where the loader looks, which has it
// already if ONNX Runtime has loaded it; in the Python packages beside this library's; in a toolkit.
std::vector<std::string> candidates() {
  if (const char* named = std::getenv("SKV_NVRTC")) return {named};
  std::vector<std::string> found;
  const auto add = [&](const std::string& folder, int major) {
    found.push_back(folder + "libnvrtc.so." + std::to_string(major));
  };
  for (const int major : kMajors) add("", major);
  Dl_info here;
  if (dladdr(reinterpret_cast<const void*>(&candidates), &here) && here.dli_fname) {
    const auto packages = std::filesystem::path(here.dli_fname).parent_path().parent_path().parent_path() / "nvidia";
    for (const int major : kMajors) {
      add(packages / ("cu" + std::to_string(major)) / "lib/", major);
      add(packages / "cuda_nvrtc/lib/", major);
    }
  }
  const char* home = std::getenv("CUDA_HOME");
  for (const int major : kMajors) add(std::string(home ? home : "/usr/local/cuda") + "/lib64/", major);
  return found;
}

const Nvrtc* open() {
  static Nvrtc nvrtc;
  for (const std::string& path : candidates()) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) continue;
    int major = 0, minor = 0;
    if (read_interface(library, nvrtc) && nvrtc.nvrtcVersion(&major, &minor) == 0) {
      Dl_info where;
      const bool known = dladdr(reinterpret_cast<const void*>(nvrtc.nvrtcVersion), &where) && where.dli_fname;
      const std::filesystem::path file = known ? where.dli_fname : path;
      const std::string version = std::to_string(major) + "." + std::to_string(minor);
      // It asks the loader for a second library, by name, and some versions don't look beside themselves: loaded here,
      // it is found.
      dlopen((file.parent_path() / ("libnvrtc-builtins.so." + version)).c_str(), RTLD_NOW | RTLD_LOCAL);
      nvrtc.name = "NVRTC " + version + " (" + file.string() + ")";
      return &nvrtc;
    }
    dlclose(library);
  }
  return nullptr;
}

// Opened when it is first needed, and kept.
const Nvrtc* nvrtc() {
  static const Nvrtc* const found = open();
  return found;
}

// Those of embedded boards, whose code other cards of the same major number don't run.
constexpr int kEmbedded[] = {87, 88, 101};

// The newest architecture that NVRTC compiles for and the card runs: of the same major number; 0 = none.
int target_of(const Nvrtc& n, int architecture) {
  int count = 0, best = 0;
  if (n.nvrtcGetNumSupportedArchs(&count) != 0 || count < 1) return 0;
  std::vector<int> known(static_cast<size_t>(count));
  if (n.nvrtcGetSupportedArchs(known.data()) != 0) return 0;
  for (const int each : known) {
    const bool embedded = std::find(std::begin(kEmbedded), std::end(kEmbedded), each) != std::end(kEmbedded);
    if (embedded && each != architecture) continue;
    if (each / 10 == architecture / 10 && each <= architecture && each > best) best = each;
  }
  return best;
}

std::string log_of(const Nvrtc& n, Nvrtc::Program program) {
  size_t size = 0;
  if (n.nvrtcGetProgramLogSize(program, &size) != 0 || size == 0) return "";
  std::string log(size, '\0');
  n.nvrtcGetProgramLog(program, log.data());
  return log.c_str();
}

}  // namespace

const std::string& nvrtc_name() {
  static const std::string none;
  return nvrtc() ? nvrtc()->name : none;
}

const std::vector<std::string>& nvrtc_options() {
  // NVRTC 13.0 takes a lambda without the names of its parameters' types for one of the host, in device code too.
  static const std::vector<std::string> options{"-std=c++17", "--device-as-default-execution-space", "--ftz=false",
                                                "--prec-div=true", "--prec-sqrt=true"};
  return options;
}

std::vector<char> nvrtc_compile(const std::string& source, int architecture, std::string& problem) {
  const Nvrtc* n = nvrtc();
  if (!n) {
    problem =
        "no NVRTC was found. Put it where the loader finds it: pip install nvidia-cuda-nvrtc (docs/gpu.md, "
        "Kernels that are compiled).";
    return {};
  }
  const int target = target_of(*n, architecture);
  if (target == 0) {
    problem = n->name + " does not know sm_" + std::to_string(architecture) + ". Install a newer nvidia-cuda-nvrtc.";
    return {};
  }
  std::vector<const char*> names, texts, options;
  for (size_t i = 0; i < kKernelSourceCount; i++) {
    names.push_back(kKernelSources[i].name);
    texts.push_back(kKernelSources[i].text);
  }
  const std::string target_option = "--gpu-architecture=sm_" + std::to_string(target);
  options.push_back(target_option.c_str());
  for (const std::string& option : nvrtc_options()) options.push_back(option.c_str());

  Nvrtc::Program program = nullptr;
  std::vector<char> cubin;
  size_t size = 0;
  if (n->nvrtcCreateProgram(&program, source.c_str(), "decode_mma.cu", int(names.size()), texts.data(), names.data())) {
    problem = n->name + " takes no program";
    return {};
  }
  if (n->nvrtcCompileProgram(program, int(options.size()), options.data()) != 0) {
    problem = n->name + ": " + log_of(*n, program).substr(0, 400);
  } else if (n->nvrtcGetCUBINSize(program, &size) == 0 && size > 0) {
    cubin.resize(size);
    if (n->nvrtcGetCUBIN(program, cubin.data()) != 0) cubin.clear();
  }
  if (cubin.empty() && problem.empty()) problem = n->name + " gave no code";
  n->nvrtcDestroyProgram(&program);
  return cubin;
}

}  // namespace skv::cuda
