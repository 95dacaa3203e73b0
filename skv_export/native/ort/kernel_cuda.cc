// The op's CUDA kernel in ONNX Runtime. Everything runs on the stream of the call, with lengths that stay on the
// device; the only number read on the host is total_sequence_length, which ONNX Runtime keeps in CPU memory.
#include <algorithm>
#include <atomic>
#include <mutex>

#include "ort/prefill_cuda.h"

// The tests build this file for the CPU provider, over the kernels in their shim.
#ifndef SKV_CUDA_PROVIDER
#define SKV_CUDA_PROVIDER "CUDAExecutionProvider"
#endif

namespace skv::ort {
namespace {

SkvType kernel_type(ElementType type) {
  return type == ElementType::kFloat ? SKV_FLOAT : type == ElementType::kFloat16 ? SKV_FLOAT16 : SKV_BFLOAT16;
}

// A number that the kernels set and the host reads without waiting: a call learns of the calls before it.
class Flag {
 public:
  Flag() { check_kernel(skv_cuda_flag_create(&value_)); }
  ~Flag() { skv_cuda_flag_destroy(value_); }
  Flag(const Flag&) = delete;
  Flag& operator=(const Flag&) = delete;

  int32_t* address() const { return value_; }
  bool is_set() const { return *static_cast<volatile int32_t*>(value_) != 0; }

 private:
  int32_t* value_ = nullptr;
};

struct Device {
  int32_t multiprocessors = 0, architecture = 0;
  Device() { check_kernel(skv_cuda_device(&multiprocessors, &architecture)); }
};

class CudaKernel : public Kernel {
 public:
  CudaKernel(const OrtKernelInfo* info, ElementType type)
      : attributes_(Attributes::read(info)),
        type_(type),
        log_(info),
        prefill_(info, attributes_, type, device_.architecture, log_) {
    flag_ = std::make_unique<Flag>();
    log_.write(Severity::kInfo, "CUDA kernels on sm_" + std::to_string(device_.architecture) + ", " +
                                    std::to_string(device_.multiprocessors) + " multiprocessors");
    if (type_ != ElementType::kFloat) load_kernels(info);
  }

  void compute(OrtKernelContext* context) override {
    const Call call(context, attributes_, type_);
    report_not_finite();
    SkvCudaContext device{};
    check(api().KernelContext_GetGPUComputeStream(context, &device.stream));
    device.max_length = call.total_sequence_length.as<int32_t>()[0];
    device.output_type = kernel_type(type_);
    device.multiprocessors = device_.multiprocessors;
    device.architecture = device_.architecture;

    const CacheBuffers caches(context, call);
    SkvAttention attention = describe(context, call, caches);
    if (call.batch > 0 && call.tokens > 0) {
      // The checks, before anything is written. Prepared tokens will be float.
      SkvAttention prepared = attention;
      if (call.needs_preparation()) prepared.type = SKV_FLOAT;
      device.scratch_bytes = skv_cuda_scratch_bytes(&prepared, &device);
      if (device.scratch_bytes < 0) check_kernel(static_cast<int>(-device.scratch_bytes));
    }
    copy_past(call, attention, device.stream);
    if (call.batch == 0 || call.tokens == 0) return;

    DeviceScratch scratch(context, device.stream);
    if (prefill_.can_run(call) && prefill_.run(context, call, attention, caches.appends, device, scratch)) {
      return log_path(attention, [] { return CudaPrefill::kPath; });
    }
    if (call.needs_preparation()) {
      const int64_t count = int64_t{call.batch} * call.tokens * call.row_size();
      auto* rows = static_cast<float*>(scratch.take(count * int64_t{sizeof(float)}));
      prepare_tokens(call, call.position_ids.as<int64_t>(), rows, device.stream, attention);
    }
    device.scratch = scratch.take(device.scratch_bytes);
    log_path(attention, [&] { return skv_cuda_path(&attention, &device); });
    if (!caches.appends) return check_kernel(skv_cuda_attend(&attention, &device));
    check_kernel(skv_cuda_attention(&attention, &device));
  }

 private:
  SkvAttention describe(OrtKernelContext* context, const Call& call, const CacheBuffers& caches) const {
    const auto cache = [&](uint8_t* data, const Tensor& past, const SkvLayout& layout) {
      return SkvCache{layout, data, past.shape[2] * past.shape[3], {}};
    };
    const int64_t output_shape[] = {call.batch, call.tokens, call.hidden_size()};
    SkvAttention attention{};
    attention.output = output_tensor(context, kOutput, output_shape, 3).data;
    attention.key_cache = cache(caches.key, call.past_key, call.attributes.key_layout);
    attention.key_cache.basis = call.basis;
    attention.value_cache = cache(caches.value, call.past_value, call.attributes.value_layout);
    attention.type = kernel_type(type_);
    set_tokens(call, attention);
    attention.seqlens_k = call.seqlens_k.as<int32_t>();
    attention.query_seqlens = call.query_seqlens.as<int32_t>();
    attention.head_sink = call.head_sink.data;
    attention.batch = call.batch;
    attention.tokens = call.tokens;
    attention.num_heads = call.attributes.num_heads;
    attention.kv_num_heads = call.attributes.kv_num_heads;
    attention.scale = call.attributes.scale;
    attention.softcap = call.attributes.softcap;
    attention.not_finite = flag_->address();
    return attention;
  }

  static void set_tokens(const Call& call, SkvAttention& attention) {
    const NewTokens tokens = tokens_in_place(call);
    attention.query = tokens.query;
    attention.key = tokens.key;
    attention.value = tokens.value;
    if (tokens.packed && attention.type != tokens.type) {  // parts of a row: addresses by the size of an element
      const auto* row = static_cast<const uint8_t*>(call.query.data);
      const int64_t bytes = type_bytes(attention.type);
      attention.key.data = row + call.hidden_size() * bytes;
      attention.value.data = row + (call.hidden_size() + call.kv_hidden_size()) * bytes;
    }
  }

  static void copy_past(const Call& call, const SkvAttention& attention, void* stream) {
    const auto copy = [&](const SkvCache& present, const Tensor& past) {
      if (present.data == past.data || past.count() == 0) return;
      check_kernel(skv_cuda_copy(present.data, past.data, past.count(), stream));
    };
    copy(attention.key_cache, call.past_key);
    copy(attention.value_cache, call.past_value);
  }

  // Those that are not built in, before any call: a call may be captured in a graph, and nobody waits for a compiler in
  // the middle of a text.
  void load_kernels(const OrtKernelInfo* info) {
    const int64_t head_dim = attributes_.known_head_dim(info);
    if (head_dim == 0) return log_.write(Severity::kInfo, "the graph does not tell head_dim: no kernels are compiled");
    Attributes known = attributes_;
    known.set_head_dim(head_dim);
    const auto say = [](void* log, int32_t is_warning, const char* text) {
      static_cast<Log*>(log)->write(is_warning ? Severity::kWarning : Severity::kInfo, text);
    };
    Log log = log_;
    const int status = skv_cuda_load(&known.key_layout, &known.value_layout, device_.architecture, say, &log);
    if (status != SKV_NOT_SUPPORTED) check_kernel(status);  // without them decode_simple runs, as was said
  }

  void report_not_finite() {
    if (!flag_->is_set() || reported_not_finite_.exchange(true)) return;
    log_.write(
        Severity::kWarning,
        "keys or values that are not finite were stored as 0; reported once. The model's activations overflow: try "
        "another dtype.");
  }

  // Each kind of kernels that this node's calls take, once.
  template <class Name>
  void log_path(const SkvAttention& attention, Name name) {
    if (!log_.has(Severity::kInfo)) return;
    const std::string path = name();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::find(paths_.begin(), paths_.end(), path) != paths_.end()) return;
    paths_.push_back(path);
    log_.write(Severity::kInfo, std::to_string(attention.tokens) + " new tokens: " + path);
  }

  const Attributes attributes_;
  const ElementType type_;
  const Log log_;
  const Device device_;
  CudaPrefill prefill_;
  std::unique_ptr<Flag> flag_;
  std::atomic<bool> reported_not_finite_{false};
  std::mutex mutex_;
  std::vector<std::string> paths_;
};

std::unique_ptr<Kernel> make_cuda_kernel(const OrtKernelInfo* info, ElementType type) {
  return std::make_unique<CudaKernel>(info, type);
}

}  // namespace

std::vector<const Definition*> cuda_definitions() {
  static const Definition definitions[] = {{SKV_CUDA_PROVIDER, ElementType::kFloat, make_cuda_kernel},
                                           {SKV_CUDA_PROVIDER, ElementType::kFloat16, make_cuda_kernel},
                                           {SKV_CUDA_PROVIDER, ElementType::kBfloat16, make_cuda_kernel}};
  std::vector<const Definition*> all;
  for (const Definition& definition : definitions) all.push_back(&definition);
  return all;
}

}  // namespace skv::ort
