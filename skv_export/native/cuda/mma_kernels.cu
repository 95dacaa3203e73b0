// Which kernels of decode_mma there are for a call: those that are built in, and those that were loaded.
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "compiler.h"
#include "errors.h"
#include "launchers.h"
#include "runtime.h"

namespace skv::cuda {
namespace {

thread_local std::string origin_text;

MmaTable built_in(const MmaForm& form) {
  if (form.dim == 64) return decode_mma_64();
#ifndef SKV_CUDA_FEW
  if (form.dim == 128) return decode_mma_128();
  if (form.dim == 256) return decode_mma_256();
#endif
  return {};
}

// Of a form: the narrowest that holds all columns, or the widest; null = none.
const MmaInstance* narrowest(const MmaTable& table, const MmaForm& form, int columns) {
  const MmaInstance* best = nullptr;
  for (size_t i = 0; i < table.count; i++) {
    const MmaInstance& m = table.instances[i];
    if (m.form == form && (!best || columns > best->columns)) best = &m;
  }
  return best;
}

// The kernels of a form for an architecture, once they were asked for; without any, the reason.
struct Loaded {
  std::vector<MmaInstance> instances;
  std::string reason;
  bool may_change = false;  // the reason: a card without free memory, say
};
class LoadedKernels {
 public:
  // The pointer stays what it is.
  const Loaded* find(const MmaForm& form, int architecture) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = all_.find(key(form, architecture));
    return found == all_.end() ? nullptr : &found->second;
  }
  const Loaded* add(const MmaForm& form, int architecture, Loaded loaded) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return &all_.emplace(key(form, architecture), std::move(loaded)).first->second;
  }
  std::mutex loading;  // one at a time, and calls with kernels that are there don't wait for it

 private:
  using Key = std::tuple<int, int, int, bool, bool, int>;
  static Key key(const MmaForm& f, int architecture) {
    return {f.dim, f.k_bits, f.v_bits, f.k_per_token, f.v_per_channel, architecture};
  }
  std::mutex mutex_;
  std::map<Key, Loaded> all_;
};
LoadedKernels& loaded_kernels() {
  static LoadedKernels all;
  return all;
}

// The kernels of a cubin, ready on the current device; none: the reason is in skv_cuda_last_error. Only when they are
// made ready does the driver look at the code, where it loads lazily.
std::vector<MmaInstance> instances_of(const MmaForm& form, const Cubin& cubin) {
  const int count = mma_blocks(form);
  const std::string name_texts[] = {kernel_name(form, 1), kernel_name(form, 2)};
  const char* const names[] = {name_texts[0].c_str(), name_texts[1].c_str()};
  const void* kernels[] = {nullptr, nullptr};
  if (cubin.code.empty() || load_kernels(cubin.code.data(), count, names, kernels)) return {};
  std::vector<MmaInstance> all;
  for (int i = 0; i < count; i++) {
    const MmaSizes sizes(form, i + 1);
    auto* kernel = reinterpret_cast<void (*)(Attention)>(const_cast<void*>(kernels[i]));
    if (make_ready(kernels[i], sizes.shared)) return {};
    all.push_back({form, 8 * (i + 1), 32 * sizes.warps, sizes.shared, kernel});
  }
  return all;
}

// Makes a form's kernels, and says what is done.
Loaded load(const MmaForm& form, int architecture, const std::function<void(bool, const std::string&)>& say) {
  const std::string name = "decode_mma " + text_of(form) + " for sm_" + std::to_string(architecture);
  Cubin cubin = make_cubin(form, architecture);
  Loaded loaded{instances_of(form, cubin), ""};
  if (loaded.instances.empty() && cubin.is_from_cache) {
    cubin = make_cubin(form, architecture, true);
    loaded.instances = instances_of(form, cubin);
  }
  if (!loaded.instances.empty()) {
    say(false, name + ": " + cubin.origin);
    if (!cubin.not_kept.empty()) {
      say(true, name + ": compiled, and not kept: " + cubin.not_kept +
                    ". Every start compiles it anew; set XDG_CACHE_HOME to a folder that can be written.");
    }
    return loaded;
  }
  loaded.may_change = !cubin.code.empty();
  loaded.reason = loaded.may_change ? skv_cuda_last_error() : cubin.origin;
  say(true, name + ": " + loaded.reason + " Decoding takes decode_simple, many times slower.");
  return loaded;
}

}  // namespace

const char* find_form(const SkvLayout& k, const SkvLayout& v, MmaForm& form) {
  form = {padded_dim(k), k.bits, v.bits, k.granularity != SKV_CHANNEL, v.granularity == SKV_CHANNEL};
  return k.recent_type != SKV_FLOAT16                           ? "recent_type is not float16"
         : form.k_per_token && k.group_size % 64                ? "k_group_size is no multiple of 64"
         : !form.v_per_channel && v.group_size % 64             ? "v_group_size is no multiple of 64"
         : form.dim != 64 && form.dim != 128 && form.dim != 256 ? "head_dim is not 64, 128 or 256"
         : !has_mma_codes(k.bits) || !has_mma_codes(v.bits)     ? "bits are not 2, 3, 4 or 8"
         : mma_blocks(form) == 0                                ? "no kernel for this form"
                                                                : nullptr;
}

const MmaInstance* find_mma(const MmaForm& form, int architecture, int columns, const char** reason) {
  const MmaInstance* found = narrowest(built_in(form), form, columns);
  if (found) return found;
  const Loaded* loaded = loaded_kernels().find(form, architecture);
  *reason = !loaded ? "its kernel was not loaded with the session" : loaded->reason.c_str();
  if (!loaded) return nullptr;
  return narrowest({loaded->instances.data(), loaded->instances.size()}, form, columns);
}

}  // namespace skv::cuda

using namespace skv::cuda;

int skv_cuda_load(const SkvLayout* key, const SkvLayout* value, int32_t architecture, SkvCudaSay say, void* log) {
  MmaForm form;
  if (find_form(*key, *value, form) || narrowest(built_in(form), form, 1)) return SKV_OK;
  const std::lock_guard<std::mutex> lock(loaded_kernels().loading);
  const Loaded* loaded = loaded_kernels().find(form, architecture);
  if (!loaded) {
    Loaded made = load(form, architecture, [&](bool warns, const std::string& text) {
      if (say) say(log, warns, text.c_str());
    });
    if (made.may_change) return fail(SKV_NOT_SUPPORTED, "%s", made.reason.c_str());  // the next session tries again
    loaded = loaded_kernels().add(form, architecture, std::move(made));
  }
  if (loaded->instances.empty()) return fail(SKV_NOT_SUPPORTED, "%s", loaded->reason.c_str());
  for (const MmaInstance& m : loaded->instances) {
    if (const int status = make_ready(reinterpret_cast<const void*>(m.kernel), m.shared_bytes)) return status;
  }
  return SKV_OK;
}

int skv_cuda_compile(const SkvLayout* key, const SkvLayout* value, int32_t architecture) {
  MmaForm form;
  if (find_form(*key, *value, form) || narrowest(built_in(form), form, 1)) return SKV_OK;
  const Cubin cubin = make_cubin(form, architecture);
  if (cubin.code.empty()) return fail(SKV_NOT_SUPPORTED, "%s", cubin.origin.c_str());
  if (!cubin.not_kept.empty()) return fail(SKV_RUNTIME_ERROR, "%s", cubin.not_kept.c_str());
  return SKV_OK;
}

int skv_cuda_origin(const SkvLayout* key, const SkvLayout* value, int32_t architecture, const char** text) {
  MmaForm form;
  int origin = SKV_CUDA_NO_KERNEL;
  if (const char* reason = find_form(*key, *value, form)) {
    origin_text = std::string("decode_simple: ") + reason;
  } else {
    origin_text = "decode_mma " + text_of(form) + ": ";
    origin = narrowest(built_in(form), form, 1) ? SKV_CUDA_BUILT_IN : SKV_CUDA_TO_COMPILE;
    origin_text += origin == SKV_CUDA_BUILT_IN ? "built in" : cubin_origin(form, architecture, origin);
  }
  *text = origin_text.c_str();
  return origin;
}
