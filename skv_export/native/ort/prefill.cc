// Implementation of ort/prefill.h.
#include "ort/prefill.h"

#include <algorithm>

#include "ort/gqa.h"

namespace skv::ort {
namespace {

// GroupQueryAttention may hold the scores of all its queries against all keys at once: queries go in chunks that keep
// these below this size, and never fewer than the smallest chunk at a time. Nor more than kChunk: it computes what the
// mask hides, too, half a chunk of keys per query, and more scores than these fall out of a core's cache.
constexpr int64_t kScoreBytes = int64_t{32} << 20;
constexpr int64_t kSmallestChunk = 32;
constexpr int64_t kChunk = 128;
constexpr int64_t kLargestWindowChunk = 512;

// How a sequence's queries are cut up, and how many positions GroupQueryAttention is shown at a time.
struct Plan {
  int64_t chunk;  // queries
  int64_t rows;   // positions

  Plan(int64_t heads, int64_t window, int64_t total) : chunk(kChunk), rows(total) {
    if (window > 0) {
      // It masks what the window hides only after computing it: show each chunk no more than its own windows.
      chunk = std::clamp(window / 2, kSmallestChunk, kLargestWindowChunk);
      rows = std::min(total, window - 1 + chunk);
    }
    const int64_t score_bytes = heads * rows * static_cast<int64_t>(sizeof(float));
    chunk = std::max(kSmallestChunk, std::min(chunk, kScoreBytes / score_bytes));
  }
};

// One sequence's keys and values [1, N_kv, rows, head_dim] in float, in the model's basis, from position first() on:
// the end of its past, then its new tokens as GroupQueryAttention appends them.
class DenseCache {
 public:
  DenseCache(OrtKernelContext* context, Scratch& scratch, const SkvAttention& attention, int64_t rows)
      : context_(context),
        scratch_(scratch),
        attention_(attention),
        heads_(attention.kv_num_heads),
        head_dim_(attention.key_cache.layout.head_dim),
        rows_(rows),
        key_(scratch.take<float>(heads_ * rows * head_dim_)),
        value_(scratch.take<float>(heads_ * rows * head_dim_)) {}

  int64_t first() const { return first_; }
  Handle<OrtValue> key() const { return cpu_tensor(ElementType::kFloat, key_, {1, heads_, rows_, head_dim_}); }
  Handle<OrtValue> value() const { return cpu_tensor(ElementType::kFloat, value_, {1, heads_, rows_, head_dim_}); }

  // Fills the rows with positions [first, past_tokens) of sequence b.
  void load(int64_t b, int64_t first, int64_t past_tokens) {
    first_ = first;
    if (past_tokens == 0) return;
    // The kernel writes a past from its start.
    float* whole = first > 0 ? scratch_.take<float>(2 * heads_ * past_tokens * head_dim_) : nullptr;
    std::vector<std::string> errors(2 * heads_);  // a failure's reason stays with the thread that met it
    const auto body = [&](size_t task) {
      const int64_t head = static_cast<int64_t>(task) / 2;
      const bool is_value = task % 2 != 0;
      float* rows = (is_value ? value_ : key_) + head * rows_ * head_dim_;
      float* target = whole != nullptr ? whole + static_cast<int64_t>(task) * past_tokens * head_dim_ : rows;
      const int status = skv_dequantize(is_value ? &attention_.value_cache : &attention_.key_cache,
                                        static_cast<int32_t>(heads_), static_cast<int32_t>(b),
                                        static_cast<int32_t>(head), past_tokens, SKV_FLOAT, target, head_dim_);
      if (status != SKV_OK) errors[task] = skv_last_error();
      if (whole != nullptr) std::copy(target + first * head_dim_, target + past_tokens * head_dim_, rows);
    };
    parallel_for(context_, errors.size(), body);
    for (const std::string& error : errors) {
      if (!error.empty()) throw Error(ErrorCode::kFail, error);
    }
  }

  // Makes room for positions up to `end`, where those from `needed` to `held` are still wanted.
  void slide(int64_t needed, int64_t held, int64_t end) {
    if (end - first_ <= rows_) return;
    for (float* tensor : {key_, value_}) {
      for (int64_t head = 0; head < heads_; ++head) {
        float* rows = tensor + head * rows_ * head_dim_;
        std::copy(rows + (needed - first_) * head_dim_, rows + (held - first_) * head_dim_, rows);
      }
    }
    first_ = needed;
  }

 private:
  OrtKernelContext* context_;
  Scratch& scratch_;
  const SkvAttention& attention_;
  const int64_t heads_, head_dim_, rows_;
  float *key_, *value_;
  int64_t first_ = 0;
};

}  // namespace

// In float, whatever the node's type: on the CPU the float16 form computes in float too, and holds all scores at once.
Prefill::Prefill(const OrtKernelInfo* info, const Attributes& attributes, const Log& log)
    : op_(make_gqa(info, attributes, ElementType::kFloat, log)) {}

void Prefill::attend(OrtKernelContext* context, const Call& call, const NewTokens& tokens,
                     const SkvAttention& attention, int64_t b, int64_t past_tokens, int64_t new_tokens,
                     float* output) const {
  Scratch scratch(context);
  const int64_t total = past_tokens + new_tokens, window = attention.key_cache.layout.local_window_size;
  const auto seen_from = [&](int64_t position) { return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0; };
  const Plan plan(attention.num_heads, window, total);
  DenseCache dense(context, scratch, attention, plan.rows);
  dense.load(b, seen_from(past_tokens), past_tokens);
  const Handle<OrtValue> past_key = dense.key(), past_value = dense.value();
  Handle<OrtValue> head_sink;
  if (attention.head_sink != nullptr) {
    head_sink = cpu_tensor(ElementType::kFloat, const_cast<void*>(attention.head_sink), {attention.num_heads});
  }
  const auto rows_of = [&](const SkvTokens& part, int64_t first, int64_t count) {
    const auto* start = static_cast<const float*>(part.data) + (b * call.tokens + first) * part.token_stride;
    return cpu_tensor(ElementType::kFloat, const_cast<float*>(start), {1, count, part.token_stride});
  };

  for (int64_t first = 0; first < new_tokens; first += plan.chunk) {
    const int64_t count = std::min(plan.chunk, new_tokens - first), position = past_tokens + first;
    dense.slide(seen_from(position), position, position + count);
    int32_t length = static_cast<int32_t>(position + count - dense.first()), seqlen = length - 1;
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
