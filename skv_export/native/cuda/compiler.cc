#include "compiler.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "kernel_sources.h"
#include "kernels_cuda.h"
#include "nvrtc.h"

namespace skv::cuda {
namespace {

namespace fs = std::filesystem;

// 64 bits of FNV-1a, of several texts with their ends.
class Hash {
 public:
  void add(const void* data, size_t size) {
    for (size_t i = 0; i < size; i++) value_ = (value_ ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3;
  }
  void add(const std::string& text) { add(text.c_str(), text.size() + 1); }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325;
};

std::string shape_of(const MmaForm& f, int blocks) {
  char text[128];
  snprintf(text, sizeof text, "MmaShape<%d, %d, %d, %s, %s, %d>", f.dim, f.k_bits, f.v_bits,
           f.k_per_token ? "true" : "false", f.v_per_channel ? "true" : "false", blocks);
  return text;
}

std::string program_of(const MmaForm& form) {
  std::string program = "#include \"nvrtc_language.h\"\n#include \"decode_mma.cuh\"\nnamespace skv::cuda {\n";
  for (int blocks = 1; blocks <= mma_blocks(form); blocks++) {
    program += "template __global__ void decode_mma_kernel<" + shape_of(form, blocks) + ">(Attention);\n";
  }
  return program + "}\n";
}

// The cache folder; empty where the environment names none.
fs::path cache_folder() {
  const char *cache = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
  if (cache && cache[0] == '/') return fs::path(cache) / "skv_export" / "kernels";
  if (home && home[0] == '/') return fs::path(home) / ".cache" / "skv_export" / "kernels";
  return {};
}

// Its name holds all that its contents depend on, but for NVRTC's version: what one has compiled stays good.
fs::path cache_file(const MmaForm& f, int architecture) {
  const fs::path folder = cache_folder();
  if (folder.empty()) return {};
  Hash hash;
  for (size_t i = 0; i < kKernelSourceCount; i++) {
    hash.add(kKernelSources[i].name);
    hash.add(kKernelSources[i].text);
  }
  hash.add(program_of(f));
  for (const std::string& option : nvrtc_options()) hash.add(option);
  char name[128];
  snprintf(name, sizeof name, "K%dV%d-D%d-%s-%s-sm_%d-%016llx.cubin", f.k_bits, f.v_bits, f.dim,
           f.k_per_token ? "token" : "channel", f.v_per_channel ? "channel" : "token", architecture,
           static_cast<unsigned long long>(hash.value()));
  return folder / name;
}

uint64_t checksum_of(const std::vector<char>& code) {
  Hash hash;
  hash.add(code.data(), code.size());
  return hash.value();
}

// A file is the cubin and its checksum, eight bytes that readers of ELF pass over. Empty: none, or a damaged one.
std::vector<char> read_kept(const fs::path& path) {
  std::vector<char> code, part(1 << 16);
  if (FILE* file = fopen(path.c_str(), "rb")) {
    while (const size_t count = fread(part.data(), 1, part.size(), file)) {
      code.insert(code.end(), part.begin(), part.begin() + std::ptrdiff_t(count));
    }
    if (ferror(file)) code.clear();
    fclose(file);
  }
  uint64_t checksum = 0;
  if (code.size() <= sizeof checksum) return {};
  memcpy(&checksum, code.data() + code.size() - sizeof checksum, sizeof checksum);
  code.resize(code.size() - sizeof checksum);
  return checksum_of(code) == checksum ? code : std::vector<char>();
}

// Written under another name and renamed: readers, and others that write the same, see a whole file or none. Returns
// why it failed, or nothing.
std::string keep(const fs::path& path, const std::vector<char>& code) {
  if (path.empty()) return "neither XDG_CACHE_HOME nor HOME names a folder";
  std::error_code error;
  fs::create_directories(path.parent_path(), error);
  if (error) return path.parent_path().string() + ": " + error.message();
  std::string partial = path.string() + ".XXXXXX";
  const int descriptor = mkstemp(partial.data());
  if (descriptor < 0) return path.parent_path().string() + ": " + std::strerror(errno);
  const uint64_t checksum = checksum_of(code);
  bool done = false;
  if (FILE* file = fdopen(descriptor, "wb")) {
    done = fchmod(descriptor, 0644) == 0;  // who runs the model may be another user than who compiled for it
    done = done && fwrite(code.data(), 1, code.size(), file) == code.size();
    done = done && fwrite(&checksum, sizeof checksum, 1, file) == 1;
    done = fclose(file) == 0 && done;
  }
  if (done) fs::rename(partial, path, error);
  if (done && !error) return "";
  const std::string problem = partial + ": " + (error ? error.message() : std::strerror(errno));
  fs::remove(partial, error);
  return problem;
}

}  // namespace

std::string text_of(const MmaForm& f) {
  char text[96];
  snprintf(text, sizeof text, "K%dV%d D%d, keys %s, values %s", f.k_bits, f.v_bits, f.dim,
           f.k_per_token ? "token" : "channel", f.v_per_channel ? "channel" : "token");
  return text;
}

std::string kernel_name(const MmaForm& f, int blocks) {
  // Of skv::cuda::decode_mma_kernel<MmaShape<...>>(Attention), as the C++ ABI writes it.
  char name[160];
  snprintf(name, sizeof name,
           "_ZN3skv4cuda17decode_mma_kernelINS0_8MmaShapeILi%dELi%dELi%dELb%dELb%dELi%dEEEEEvNS0_9AttentionE", f.dim,
           f.k_bits, f.v_bits, f.k_per_token, f.v_per_channel, blocks);
  return name;
}

Cubin make_cubin(const MmaForm& form, int architecture, bool anew) {
  Cubin made;
  const fs::path path = cache_file(form, architecture);
  if (!anew) made.code = read_kept(path);
  made.is_from_cache = !made.code.empty();
  if (made.is_from_cache) {
    made.origin = "from " + path.string();
    return made;
  }
  const auto start = std::chrono::steady_clock::now();
  std::string problem;
  made.code = nvrtc_compile(program_of(form), architecture, problem);
  if (made.code.empty()) {
    made.origin = problem;
    return made;
  }
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  char seconds[32];
  snprintf(seconds, sizeof seconds, "%.1f s", taken.count());
  made.origin = "compiled in " + std::string(seconds) + " by " + nvrtc_name();
  made.not_kept = keep(path, made.code);
  return made;
}

std::string cubin_origin(const MmaForm& form, int architecture, int& origin) {
  const fs::path path = architecture ? cache_file(form, architecture) : fs::path();
  if (!path.empty() && !read_kept(path).empty()) {
    origin = SKV_CUDA_KEPT;
    return "from " + path.string();
  }
  origin = nvrtc_name().empty() ? SKV_CUDA_MISSING : SKV_CUDA_TO_COMPILE;
  if (origin == SKV_CUDA_MISSING) {
    std::string problem;
    nvrtc_compile("", architecture, problem);
    return problem;
  }
  return "compiled when a session is made, by " + nvrtc_name();
}

}  // namespace skv::cuda
