// Owns the definitions of ort_prefill.h.
#include "ort_prefill.h"

#include <algorithm>

namespace skv::ort {
namespace {

constexpr int kGqaInputs = 12, kGqaOutputs = 3;  // up to head_sink; output, present_key, present_value
constexpr int kGqaHeadSink = 11;

// GroupQueryAttention may hold the scores of all its queries against all keys at once: queries go in chunks that keep
// these below this size, and never fewer than the smallest chunk at a time.
constexpr int64_t kScoreBytes = int64_t{32} << 20;
constexpr int64_t kSmallestChunk = 32;

Handle<OrtOpAttr> attribute(const char* name, const void* value, AttributeType type) {
  OrtOpAttr* made = nullptr;
  check(api().CreateOpAttr(name, value, 1, type, &made));
  return Handle<OrtOpAttr>(made);
}

// Float, whatever the node's type: on the CPU its float16 form computes in float too, and holds all scores at once.
OrtStatus* create_gqa(const OrtKernelInfo* info, const Attributes& a, OrtOp** op) {
  const int64_t num_heads = a.num_heads, kv_num_heads = a.kv_num_heads;
  const int64_t window = a.key_layout.local_window_size > 0 ? a.key_layout.local_window_size : -1;
  const Handle<OrtOpAttr> attributes[] = {
      attribute("num_heads", &num_heads, AttributeType::kInt),
      attribute("kv_num_heads", &kv_num_heads, AttributeType::kInt),
      attribute("local_window_size", &window, AttributeType::kInt),
      attribute("scale", &a.scale, AttributeType::kFloat),
      attribute("softcap", &a.softcap, AttributeType::kFloat),
  };
  std::vector<const OrtOpAttr*> pointers;
  for (const auto& handle : attributes) pointers.push_back(handle.get());
  const char* type_names[] = {"T", "M", "T_CACHE", "T_KV_SCALE"};
  const ElementType types[] = {ElementType::kFloat, ElementType::kInt32, ElementType::kFloat, ElementType::kFloat};
  // The cache's types are constraints of their own since it can be quantized; before (1.24) there are the first two.
  OrtStatus* status = nullptr;
  for (const int num_types : {4, 2}) {
    if (status != nullptr) api().ReleaseStatus(status);
    status = api().CreateOp(info, "GroupQueryAttention", "com.microsoft", 1, type_names, types, num_types,
                            pointers.data(), static_cast<int>(pointers.size()), kGqaInputs, kGqaOutputs, op);
    if (status == nullptr) break;
  }
  return status;
}

// One sequence's keys and values [1, N_kv, length, head_dim] in float, in the model's basis: its past now, its new
// tokens as GroupQueryAttention appends them.
struct DenseCache {
  float *key, *value;
  int64_t length;

  DenseCache(Scratch& scratch, const Call& call, int64_t length) : length(length) {
    key = scratch.take<float>(length * call.kv_hidden_size());
    value = scratch.take<float>(length * call.kv_hidden_size());
  }

  void load_past(OrtKernelContext* context, const SkvAttention& attention, int64_t b, int64_t past_tokens) const {
    if (past_tokens == 0) return;
    const int32_t heads = attention.kv_num_heads, head_dim = attention.key_cache.layout.head_dim;
    std::vector<std::string> errors(2 * heads);  // a failure's reason stays with the thread that met it
    const auto body = [&](size_t task) {
      const int32_t head = static_cast<int32_t>(task) / 2;
      const SkvCache& cache = task % 2 != 0 ? attention.value_cache : attention.key_cache;
      float* rows = (task % 2 != 0 ? value : key) + head * length * head_dim;
      const int status =
          skv_dequantize(&cache, heads, static_cast<int32_t>(b), head, past_tokens, SKV_FLOAT, rows, head_dim);
      if (status != SKV_OK) errors[task] = skv_last_error();
    };
    parallel_for(context, errors.size(), body);
    for (const std::string& error : errors) {
      if (!error.empty()) throw Error(ErrorCode::kFail, error);
    }
  }
};

}  // namespace

Prefill::Prefill(const OrtKernelInfo* info, const Attributes& attributes, const Log& log) {
  OrtOp* op = nullptr;
  if (OrtStatus* status = create_gqa(info, attributes, &op)) {
    log.write(Severity::kWarning,
              std::string("prompts take the slower path of the op's own kernel, as this ONNX Runtime gives no "
                          "GroupQueryAttention: ") +
                  api().GetErrorMessage(status));
    api().ReleaseStatus(status);
  }
  op_.reset(op);
}

void Prefill::attend(OrtKernelContext* context, const Call& call, const NewTokens& tokens,
                     const SkvAttention& attention, int64_t b, int64_t past_tokens, int64_t new_tokens,
                     float* output) const {
  Scratch scratch(context);
  const int64_t total = past_tokens + new_tokens, heads = attention.num_heads, kv_heads = attention.kv_num_heads;
  const DenseCache dense(scratch, call, total);
  dense.load_past(context, attention, b, past_tokens);
  const Handle<OrtValue> past_key = cpu_tensor(ElementType::kFloat, dense.key, {1, kv_heads, total, call.head_dim});
  const Handle<OrtValue> past_value = cpu_tensor(ElementType::kFloat, dense.value, {1, kv_heads, total, call.head_dim});
  Handle<OrtValue> head_sink;
  if (attention.head_sink != nullptr) {
    head_sink = cpu_tensor(ElementType::kFloat, const_cast<void*>(attention.head_sink), {heads});
  }
  const auto rows_of = [&](const SkvTokens& part, int64_t first, int64_t count) {
    const auto* start = static_cast<const float*>(part.data) + (b * call.tokens + first) * part.token_stride;
    return cpu_tensor(ElementType::kFloat, const_cast<float*>(start), {1, count, part.token_stride});
  };

  const int64_t score_bytes = heads * total * static_cast<int64_t>(sizeof(float));
  const int64_t chunk = std::max(kSmallestChunk, kScoreBytes / score_bytes);
  for (int64_t first = 0; first < new_tokens; first += chunk) {
    const int64_t count = std::min(chunk, new_tokens - first);
    int32_t length = static_cast<int32_t>(past_tokens + first + count), seqlen = length - 1;
    const Handle<OrtValue> seqlens_k = cpu_tensor(ElementType::kInt32, &seqlen, {1});
    const Handle<OrtValue> total_length = cpu_tensor(ElementType::kInt32, &length, {});
    const Handle<OrtValue> query = rows_of(tokens.query, first, count);
    Handle<OrtValue> key, value;
    if (!tokens.packed) {
      key = rows_of(tokens.key, first, count);
      value = rows_of(tokens.value, first, count);
    }
    const int64_t hidden = call.hidden_size();
    const Handle<OrtValue> rows = cpu_tensor(ElementType::kFloat, output + first * hidden, {1, count, hidden});
    const OrtValue* inputs[kGqaInputs] = {query.get(),      key.get(),       value.get(),       past_key.get(),
                                          past_value.get(), seqlens_k.get(), total_length.get()};
    inputs[kGqaHeadSink] = head_sink.get();
    OrtValue* outputs[kGqaOutputs] = {rows.get(), past_key.get(), past_value.get()};
    check(api().InvokeOp(context, op_.get(), inputs, kGqaInputs, outputs, kGqaOutputs));
  }
}

}  // namespace skv::ort
