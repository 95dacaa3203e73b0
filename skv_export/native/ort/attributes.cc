// Reads and checks the node's attributes.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "layout_check.h"
#include "ort/op.h"

namespace skv::ort {
namespace {

constexpr int64_t kMaxHeads = 1 << 16;

class Reader {
 public:
  explicit Reader(const OrtKernelInfo* info) : info_(info), node_(node_name(info)) {}

  bool integer(const char* name, int64_t* value) const {
    if (succeeds(api().KernelInfoGetAttribute_int64(info_, name, value))) return true;
    refuse_other_types(name, "an integer");
    return false;
  }

  int32_t integer(const char* name, int64_t fallback, int64_t low, int64_t high) const {
    int64_t value = fallback;
    integer(name, &value);
    if (value < low || value > high) {
      bad(name, std::to_string(value), std::to_string(low) + " ... " + std::to_string(high));
    }
    return static_cast<int32_t>(value);
  }

  template <size_t N>
  int32_t required(const char* name, const int32_t (&allowed)[N]) const {
    int64_t value = 0;
    if (!integer(name, &value)) bad(name, "nothing", list(allowed));
    return one_of(name, value, allowed);
  }

  template <size_t N>
  int32_t choice(const char* name, int64_t fallback, const int32_t (&allowed)[N]) const {
    int64_t value = fallback;
    integer(name, &value);
    return one_of(name, value, allowed);
  }

  int32_t required_count(const char* name) const {
    int64_t value = 0;
    if (!integer(name, &value)) bad(name, "nothing", "a number of heads");
    if (value < 1 || value > kMaxHeads) bad(name, std::to_string(value), "1 ... " + std::to_string(kMaxHeads));
    return static_cast<int32_t>(value);
  }

  float real(const char* name, float fallback) const {
    float value = fallback;
    if (!succeeds(api().KernelInfoGetAttribute_float(info_, name, &value))) {
      refuse_other_types(name, "a float");
      value = fallback;
    }
    if (!(value >= 0) || std::isinf(value)) bad(name, std::to_string(value), "0 or more, finite");
    return value;
  }

  // The number of a name among `allowed`.
  template <size_t N>
  int32_t text(const char* name, const char* fallback, const char* const (&allowed)[N]) const {
    std::string value = fallback;
    size_t bytes = 0;
    if (succeeds(api().KernelInfoGetAttribute_string(info_, name, nullptr, &bytes))) {
      value.resize(bytes);
      check(api().KernelInfoGetAttribute_string(info_, name, value.data(), &bytes));
      value.resize(bytes > 0 ? bytes - 1 : 0);  // without the closing zero
    } else {
      refuse_other_types(name, "a string");
    }
    std::string names;
    for (size_t i = 0; i < N; i++) {
      if (value == allowed[i]) return static_cast<int32_t>(i);
      names += (names.empty() ? "" : " or ") + std::string(allowed[i]);
    }
    bad(name, "'" + value + "'", names);
  }

  [[noreturn]] void bad(const char* name, const std::string& got, const std::string& expected) const {
    fail("node '" + node_ + "': attribute " + name, got, expected,
         "Export the model again with this version of skv-export.");
  }

 private:
  static bool succeeds(OrtStatus* status) {
    if (status == nullptr) return true;
    api().ReleaseStatus(status);
    return false;
  }

  template <size_t N>
  int32_t one_of(const char* name, int64_t value, const int32_t (&allowed)[N]) const {
    for (const int32_t choice : allowed) {
      if (value == choice) return choice;
    }
    bad(name, std::to_string(value), list(allowed));
  }

  template <size_t N>
  static std::string list(const int32_t (&values)[N]) {
    std::string text;
    for (const int32_t value : values) text += (text.empty() ? "" : " or ") + std::to_string(value);
    return text;
  }

  // ONNX Runtime answers alike for an attribute that is not there and one of another type; the second must not pass for
  // a default.
  void refuse_other_types(const char* name, const char* expected) const {
    int64_t integer = 0;
    float real = 0;
    size_t bytes = 0, integers = 0, reals = 0;
    if (succeeds(api().KernelInfoGetAttribute_int64(info_, name, &integer))) bad(name, "an integer", expected);
    if (succeeds(api().KernelInfoGetAttribute_float(info_, name, &real))) bad(name, "a float", expected);
    if (succeeds(api().KernelInfoGetAttribute_string(info_, name, nullptr, &bytes))) bad(name, "a string", expected);
    if (succeeds(api().KernelInfoGetAttributeArray_int64(info_, name, nullptr, &integers)))
      bad(name, "a list", expected);
    if (succeeds(api().KernelInfoGetAttributeArray_float(info_, name, nullptr, &reals))) bad(name, "a list", expected);
  }

  const OrtKernelInfo* info_;
  std::string node_;
};

SkvLayout read_layout(const Reader& reader, bool is_value) {
  const auto name = [&](const char* key, const char* value) { return is_value ? value : key; };
  SkvLayout layout{};
  layout.bits = reader.required(name("k_bits", "v_bits"), kBits);
  layout.granularity = reader.text(name("k_granularity", "v_granularity"), name("channel", "token"), kGranularities);
  layout.rotation = reader.text(name("k_rotation", "v_rotation"), name("none", "hadamard"), kRotations);
  const char* bits = name("k_parameter_bits", "v_parameter_bits");
  layout.parameter_bits = reader.integer(bits, 16, INT32_MIN, INT32_MAX);
  if (!can_have_parameter_bits(layout.parameter_bits, layout.granularity)) {
    reader.bad(bits, std::to_string(layout.parameter_bits), "16, or 8 with granularity channel");
  }
  layout.group_size = reader.integer(name("k_group_size", "v_group_size"), 0, 0, kMaxHeadDim);
  layout.num_sink_tokens = reader.integer("num_sink_tokens", 4, 0, kMaxKeptTokens);
  layout.recent_tokens = reader.integer("recent_tokens", 64, 0, kMaxKeptTokens);
  layout.recent_type = reader.text("recent_type", "float16", kRecentTypes);
  layout.is_value = is_value;
  layout.tile_tokens = reader.choice("tile_tokens", 64, kTileTokens);
  // GroupQueryAttention writes "no window" as -1.
  layout.local_window_size = std::max(0, reader.integer("local_window_size", -1, -1, kMaxWindow));
  return layout;
}

void set_head_dim(SkvLayout& layout, int32_t head_dim) {
  layout.head_dim = head_dim;
  if (layout.group_size == 0) layout.group_size = padded_dim(layout) % 64 == 0 ? 64 : 32;
  const LayoutProblem problem = find_problem(layout);
  if (problem.field == nullptr) return;
  const bool own = strcmp(problem.field, "group_size") == 0;  // the attributes that depend on head_dim
  fail((own ? layout.is_value ? "v_" : "k_" : "") + std::string(problem.field), std::to_string(problem.got),
       problem.expected);
}

constexpr int64_t kAbsent = -2;

// Size of an input's last dimension as far as the graph tells; -1 = not known, kAbsent = there is no such input.
int64_t known_last_dimension(const OrtKernelInfo* info, Input input) {
  OrtTypeInfo* type = nullptr;
  if (OrtStatus* status = api().KernelInfo_GetInputTypeInfo(info, input, &type)) {
    api().ReleaseStatus(status);
    return kAbsent;
  }
  const Handle<OrtTypeInfo> owner(type);
  const OrtTensorTypeAndShapeInfo* shape = nullptr;
  check(api().CastTypeInfoToTensorInfo(type, &shape));
  if (shape == nullptr) return kAbsent;
  size_t rank = 0;
  check(api().GetDimensionsCount(shape, &rank));
  std::vector<int64_t> sizes(rank);
  check(api().GetDimensions(shape, sizes.data(), rank));
  return rank > 0 ? sizes.back() : -1;
}

}  // namespace

Attributes Attributes::read(const OrtKernelInfo* info) {
  const Reader reader(info);
  const int32_t versions[] = {SKV_LAYOUT_VERSION};
  reader.required("layout_version", versions);
  Attributes a{};
  a.num_heads = reader.required_count("num_heads");
  a.kv_num_heads = reader.required_count("kv_num_heads");
  if (a.num_heads % a.kv_num_heads != 0) {
    reader.bad("num_heads", std::to_string(a.num_heads),
               "a multiple of kv_num_heads, " + std::to_string(a.kv_num_heads));
  }
  a.scale = reader.real("scale", 0);
  a.softcap = reader.real("softcap", 0);
  a.qk_norm_epsilon = reader.real("qk_norm_epsilon", 1e-6f);
  a.do_rotary = reader.integer("do_rotary", 0, 0, 1) != 0;
  a.rotary_interleaved = reader.integer("rotary_interleaved", 0, 0, 1) != 0;
  a.key_layout = read_layout(reader, false);
  a.value_layout = read_layout(reader, true);
  a.check_known_shapes(info);
  return a;
}

// Finds what the graph's own shapes rule out while the session is made, not at the first call.
void Attributes::check_known_shapes(const OrtKernelInfo* info) const {
  const int64_t hidden = known_last_dimension(info, kQuery), kv_hidden = known_last_dimension(info, kKey);
  if (hidden <= 0 || kv_hidden <= 0) return;  // packed, or not known
  if (hidden % num_heads != 0 || hidden / num_heads * kv_num_heads != kv_hidden) {
    fail("node '" + node_name(info) + "': last dimensions of query and key",
         std::to_string(hidden) + " and " + std::to_string(kv_hidden),
         "num_heads * head_dim and kv_num_heads * head_dim, with " + std::to_string(num_heads) + " and " +
             std::to_string(kv_num_heads) + " heads");
  }
  try {
    Attributes(*this).set_head_dim(hidden / num_heads);
  } catch (const Error& error) {
    throw Error(error.code, "node '" + node_name(info) + "': " + error.what());
  }
}

int64_t Attributes::known_head_dim(const OrtKernelInfo* info) const {
  const int64_t hidden = known_last_dimension(info, kQuery), kv_hidden = known_last_dimension(info, kKey);
  if (kv_hidden <= 0 && kv_hidden != kAbsent) return 0;
  const int64_t heads = kv_hidden > 0 ? num_heads : int64_t{num_heads} + 2 * int64_t{kv_num_heads};  // or packed
  return hidden > 0 && hidden % heads == 0 ? hidden / heads : 0;
}

void Attributes::set_head_dim(int64_t head_dim) {
  if (head_dim < 1 || head_dim > kMaxHeadDim) {
    fail("head_dim (query's last dimension over the heads)", std::to_string(head_dim),
         "1 ... " + std::to_string(kMaxHeadDim));
  }
  ort::set_head_dim(key_layout, static_cast<int32_t>(head_dim));
  ort::set_head_dim(value_layout, static_cast<int32_t>(head_dim));
}

}  // namespace skv::ort
