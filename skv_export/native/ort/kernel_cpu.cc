// The op's CPU kernel, and RegisterCustomOps, which registers the kernels of all providers when ONNX Runtime loads the
// library.
//
// A sequence with few new tokens goes to skv_attention; more go through GroupQueryAttention (ort/prefill.h) and
// skv_append.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/checks.h"
#include "ort/prefill.h"

namespace skv::ort {
namespace {

// Whether the op's own kernel is the faster one for a sequence's new tokens: it reads the past once per few queries,
// where the other path dequantizes it once. Measured in CPU time over 500 to 8,000 tokens, heads 9 over 3 of 64 and 32
// over 8 of 128: the AVX-512 kernel wins up to 32 to 100 tokens, the portable one up to 1 or 2; without a past, up
// to 4.
bool are_few(int64_t past_tokens, int64_t new_tokens) {
  static const bool vectorized = std::strcmp(skv_cpu_isa(), "scalar") != 0;
  if (past_tokens == 0) return new_tokens <= 4;
  return new_tokens <= (vectorized ? 32 : 2);
}

// Most that one sequence's keys and values of a layer may take when dequantized: a longer past stays in its tiles,
// which the op's own kernel reads in place.
constexpr int64_t kMostDenseBytes = int64_t{256} << 20;

bool are_few(const SkvAttention& attention, int64_t b) {
  const int64_t added = new_tokens(attention, b), total = total_tokens(attention, b);
  const int64_t hidden = int64_t{attention.kv_num_heads} * attention.key_cache.layout.head_dim;
  const bool too_large = added < total && 2 * total * hidden * int64_t{sizeof(float)} > kMostDenseBytes;
  return too_large || are_few(total - added, added);
}

bool any_are_many(const SkvAttention& attention) {
  for (int64_t b = 0; b < attention.batch; ++b) {
    if (!are_few(attention, b)) return true;
  }
  return false;
}

// Whether all numbers of a sequence's new tokens, in float, are finite. GroupQueryAttention multiplies what a query
// does not see by 0, which does not hide what is not a number.
bool are_finite(const SkvAttention& call, int64_t b) {
  const int64_t head_dim = call.key_cache.layout.head_dim, added = new_tokens(call, b);
  const auto finite = [&](const SkvTokens& part, int64_t heads) {
    for (int64_t t = 0; t < added; ++t) {
      const float* row = static_cast<const float*>(part.data) + (b * call.tokens + t) * part.token_stride;
      if (!all_finite(row, heads * head_dim)) return false;
    }
    return true;
  };
  return finite(call.query, call.num_heads) && finite(call.key, call.kv_num_heads) &&
         finite(call.value, call.kv_num_heads);
}

// What the nodes of one session share.
struct Session {
  std::atomic<bool> reported_not_finite{false};

  static std::shared_ptr<Session> of(const OrtLogger* logger) {
    static std::mutex mutex;
    static std::map<const OrtLogger*, std::weak_ptr<Session>> sessions;
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto i = sessions.begin(); i != sessions.end();) i = i->second.expired() ? sessions.erase(i) : std::next(i);
    std::shared_ptr<Session> session = sessions[logger].lock();
    if (!session) sessions[logger] = session = std::make_shared<Session>();
    return session;
  }
};

void check_kernel(int status) { check_status(status, skv_last_error); }

// The part of a call that is sequence b.
SkvAttention sequence(const SkvAttention& call, int64_t b) {
  const auto skip_blocks = [&](SkvCache& cache) { cache.data += b * call.kv_num_heads * cache.block_bytes; };
  const auto skip_tokens = [&](SkvTokens& part) {
    part.data = static_cast<const uint8_t*>(part.data) + b * call.tokens * part.token_stride * type_bytes(call.type);
  };
  SkvAttention one = call;
  one.batch = 1;
  skip_blocks(one.key_cache);
  skip_blocks(one.value_cache);
  skip_tokens(one.query);
  skip_tokens(one.key);
  skip_tokens(one.value);
  const int64_t hidden = int64_t{call.num_heads} * call.key_cache.layout.head_dim;
  one.output = static_cast<uint8_t*>(call.output) + b * call.tokens * hidden * type_bytes(call.type);
  one.seqlens_k += b;
  if (one.query_seqlens != nullptr) one.query_seqlens += b;
  return one;
}

class CpuKernel : public Kernel {
 public:
  CpuKernel(const OrtKernelInfo* info, ElementType type)
      : attributes_(Attributes::read(info)),
        type_(type),
        log_(info),
        session_(Session::of(log_.session())),
        prefill_(info, attributes_, log_),
        num_threads_(static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()))) {
    log_.write(Severity::kInfo, "keys " + std::to_string(attributes_.key_layout.bits) + " bits, values " +
                                    std::to_string(attributes_.value_layout.bits) +
                                    " bits, CPU kernels: " + skv_cpu_isa());
  }

  void compute(OrtKernelContext* context) override {
    const Call call(context, attributes_, type_);
    const int64_t output_shape[] = {call.batch, call.tokens, call.hidden_size()};
    void* output = output_tensor(context, kOutput, output_shape, 3).data;
    const CacheBuffers caches(context, call);
    SkvAttention attention = describe(call, caches, output);
    if (output_size(call) == 0) return copy_past(call, attention);
    check_kernel(check_call(attention, false));
    check_total(call, attention);

    Scratch scratch(context);
    const bool many = prefill_.can_run(call) && any_are_many(attention);
    const bool in_float = call.needs_preparation() || (many && type_ == ElementType::kFloat16);
    const NewTokens tokens = in_float ? to_float(context, call, scratch, attention) : tokens_in_place(call);
    copy_past(call, attention);
    if (many) {
      attend_to_many(context, call, tokens, attention, caches.appends);
    } else {
      log_path(call, "the op's kernel");
      attend_to_few(context, attention, caches.appends);
    }
    if (attention.output != output) {
      float_to_half(static_cast<const float*>(attention.output), static_cast<uint16_t*>(output), output_size(call));
    }
  }

 private:
  static int64_t output_size(const Call& call) { return int64_t{call.batch} * call.tokens * call.hidden_size(); }

  // The call as the kernels take it, on the inputs as they are.
  static SkvAttention describe(const Call& call, const CacheBuffers& caches, void* output) {
    const auto cache = [&](uint8_t* data, const Tensor& past, const SkvLayout& layout) {
      return SkvCache{layout, data, past.shape[2] * past.shape[3], {}};
    };
    const NewTokens tokens = tokens_in_place(call);
    SkvAttention attention{};
    attention.key_cache = cache(caches.key, call.past_key, call.attributes.key_layout);
    attention.key_cache.basis = call.basis;
    attention.value_cache = cache(caches.value, call.past_value, call.attributes.value_layout);
    attention.query = tokens.query;
    attention.key = tokens.key;
    attention.value = tokens.value;
    attention.output = output;
    attention.seqlens_k = call.seqlens_k.as<int32_t>();
    attention.query_seqlens = call.query_seqlens.as<int32_t>();
    attention.head_sink = call.head_sink.data;
    attention.type = tokens.type;
    attention.batch = call.batch;
    attention.tokens = call.tokens;
    attention.num_heads = call.attributes.num_heads;
    attention.kv_num_heads = call.attributes.kv_num_heads;
    attention.scale = call.attributes.scale;
    attention.softcap = call.attributes.softcap;
    return attention;
  }

  static void check_total(const Call& call, const SkvAttention& attention) {
    const int64_t total = call.total_sequence_length.as<int32_t>()[0];
    for (int64_t b = 0; b < call.batch; ++b) {
      if (total_tokens(attention, b) <= total) continue;
      fail("total_sequence_length", std::to_string(total),
           "at least " + std::to_string(total_tokens(attention, b)) + ", the length of sequence " + std::to_string(b));
    }
  }

  static void copy_past(const Call& call, const SkvAttention& attention) {
    const auto copy = [](const SkvCache& present, const Tensor& past) {
      if (present.data != past.data && past.count() > 0) std::memcpy(present.data, past.data, past.count());
    };
    copy(attention.key_cache, call.past_key);
    copy(attention.value_cache, call.past_value);
  }

  // Replaces the call's tokens, output and head sink by float ones.
  static NewTokens to_float(OrtKernelContext* context, const Call& call, Scratch& scratch, SkvAttention& attention) {
    const NewTokens tokens = prepare_tokens(call, attention, context, scratch);
    attention.query = tokens.query;
    attention.key = tokens.key;
    attention.value = tokens.value;
    if (attention.type != SKV_FLOAT) {
      attention.output = scratch.take<float>(output_size(call));
      if (call.head_sink) {
        float* sink = scratch.take<float>(call.attributes.num_heads);
        half_to_float(call.head_sink.as<uint16_t>(), sink, call.attributes.num_heads);
        attention.head_sink = sink;
      }
    }
    attention.type = SKV_FLOAT;
    return tokens;
  }

  // All that can fail comes first: once a sequence is appended to, the call must succeed.
  void attend_to_many(OrtKernelContext* context, const Call& call, const NewTokens& tokens,
                      const SkvAttention& attention, bool appends) const {
    log_path(call, "GroupQueryAttention");
    const int64_t hidden = call.hidden_size();
    std::vector<char> own(call.batch);
    for (int64_t b = 0; b < call.batch; ++b) own[b] = are_few(attention, b) || !are_finite(attention, b);
    for (int64_t b = 0; b < call.batch; ++b) {
      if (own[b]) continue;
      const int64_t added = new_tokens(attention, b);
      float* rows = static_cast<float*>(attention.output) + b * call.tokens * hidden;
      prefill_.attend(context, call, tokens, attention, b, total_tokens(attention, b) - added, added, rows);
      std::fill(rows + added * hidden, rows + call.tokens * hidden, 0.0f);
    }
    for (int64_t b = 0; b < call.batch; ++b) {
      SkvAttention one = sequence(attention, b);
      if (own[b]) {
        attend_to_few(context, one, appends);
      } else if (appends) {
        run(context, one, skv_append);
      }
    }
  }

  void attend_to_few(OrtKernelContext* context, SkvAttention& attention, bool appends) const {
    run(context, attention, appends ? skv_attention : skv_attend);
  }

  void run(OrtKernelContext* context, SkvAttention& attention,
           int (*kernel)(const SkvAttention*, const SkvThreads*)) const {
    const SkvThreads threads = {[](void* pool, void (*body)(void*, size_t), size_t count, void* state) {
                                  parallel_for(static_cast<OrtKernelContext*>(pool), body, count, state);
                                },
                                context, num_threads_};
    int32_t not_finite = 0;
    attention.not_finite = &not_finite;
    check_kernel(kernel(&attention, &threads));
    if (not_finite != 0 && !session_->reported_not_finite.exchange(true)) {
      log_.write(
          Severity::kWarning,
          "keys or values that are not finite were stored as 0; reported once per session. The model's activations "
          "overflow: try another dtype.");
    }
  }

  void log_path(const Call& call, const char* path) const {
    if (!log_.has(Severity::kVerbose)) return;
    log_.write(Severity::kVerbose, std::to_string(call.batch) + " sequences, up to " + std::to_string(call.tokens) +
                                       " new tokens: " + path);
  }

  const Attributes attributes_;
  const ElementType type_;
  const Log log_;
  const std::shared_ptr<Session> session_;
  const Prefill prefill_;
  const int32_t num_threads_;
};

std::unique_ptr<Kernel> make_cpu_kernel(const OrtKernelInfo* info, ElementType type) {
  return std::make_unique<CpuKernel>(info, type);
}

// The domain, and what it points to, must outlive every session that was made with it: it lives as long as the process.
OrtCustomOpDomain* domain() {
  static OrtCustomOpDomain* const made = [] {
    static const Definition cpu[] = {{"CPUExecutionProvider", ElementType::kFloat, make_cpu_kernel},
                                     {"CPUExecutionProvider", ElementType::kFloat16, make_cpu_kernel}};
    OrtCustomOpDomain* domain = nullptr;
    check(api().CreateCustomOpDomain("skv", &domain));
    for (const Definition& definition : cpu) check(api().CustomOpDomain_Add(domain, &definition));
#if defined(SKV_WITH_CUDA)
    for (const Definition* definition : cuda_definitions()) check(api().CustomOpDomain_Add(domain, definition));
#endif
    return domain;
  }();
  return made;
}

}  // namespace
}  // namespace skv::ort

// What onnxruntime's register_custom_ops_library looks for.
extern "C" SKV_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const skv::ort::ApiBase* base) {
  using namespace skv::ort;
  if (OrtStatus* status = load_api(base)) return status;
  return guarded([&] { check(api().AddCustomOpDomain(options, domain())); });
}
