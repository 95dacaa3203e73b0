// Implementation of ort/prefill_cuda.h.
//
// No length is known on the host, so each sequence is attended to as if all of its `tokens` rows were new tokens,
// behind its past: what stands in rows of padding is seen by no other row, and their output is cleared at the end.
#include "ort/prefill_cuda.h"

#include <algorithm>

#include "ort/gqa.h"

namespace skv::ort {
namespace {

// Each sequence is a few launches of its own, some ten microseconds: with fewer tokens the op's own kernels take all
// sequences at once.
constexpr int64_t kFewestTokens = 64, kFewestPerSequence = 32;

}  // namespace

void check_kernel(int status) { check_status(status, skv_cuda_last_error); }

DeviceScratch::DeviceScratch(OrtKernelContext* context, void* stream) : context_(context), stream_(stream) {
  const OrtValue* query = nullptr;
  OrtAllocator* allocator = nullptr;
  check(api().KernelContext_GetInput(context, kQuery, &query));
  check(api().GetTensorMemoryInfo(query, &memory_));
  check(api().KernelContext_GetAllocator(context, memory_, &allocator));
  allocator_.reset(allocator);
}

DeviceScratch::~DeviceScratch() {
  for (void* block : blocks_) {
    if (OrtStatus* status = api().AllocatorFree(allocator_.get(), block)) api().ReleaseStatus(status);
  }
}

void* DeviceScratch::take(int64_t bytes) {
  void* block = nullptr;
  const auto size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  if (stream_ != nullptr) {
    check(api().KernelContext_GetScratchBuffer(context_, memory_, size, &block));
  } else {
    check(api().AllocatorAlloc(allocator_.get(), size, &block));
  }
  if (block == nullptr)
    throw Error(ErrorCode::kFail, "out of device memory: " + std::to_string(bytes) + " bytes of scratch");
  blocks_.push_back(block);
  return block;
}

Handle<OrtValue> DeviceScratch::tensor(ElementType type, const void* data, const std::vector<int64_t>& shape) const {
  size_t bytes = type == ElementType::kFloat || type == ElementType::kInt32 ? 4 : 2;
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  OrtValue* value = nullptr;
  check(api().CreateTensorWithDataAsOrtValue(memory_, const_cast<void*>(data), bytes, shape.data(), shape.size(), type,
                                             &value));
  return Handle<OrtValue>(value);
}

// The CUDA provider has none for float32.
CudaPrefill::CudaPrefill(const OrtKernelInfo* info, const Attributes& attributes, ElementType type, const Log& log)
    : op_(type == ElementType::kFloat ? nullptr : make_gqa(info, attributes, type, log)), type_(type), log_(log) {}

bool CudaPrefill::can_run(const Call& call) const {
  const int64_t fewest = std::max(kFewestTokens, kFewestPerSequence * call.batch);
  return call.tokens >= fewest && op_ != nullptr && !refused_ && call.head_dim % 8 == 0;
}

bool CudaPrefill::attend(OrtKernelContext* context, const Call& call, const SkvAttention& attention,
                         const SkvCudaContext& device, DeviceScratch& scratch) {
  const int64_t tokens = call.tokens, heads = attention.kv_num_heads, head_dim = call.head_dim;
  const int64_t hidden = call.hidden_size(), kv_hidden = call.kv_hidden_size(), row = hidden + 2 * kv_hidden;
  const int64_t bytes = type_bytes(device.output_type);
  // Room for any past and `tokens` rows behind it. As many rows as tokens mean a first prompt: no sequence has a past.
  const int64_t rows = call.query_seqlens ? device.max_length + tokens : std::max(device.max_length, tokens);
  auto* lengths = static_cast<int32_t*>(scratch.take(call.batch * int64_t{sizeof(int32_t)}));
  check_kernel(skv_cuda_dense_lengths(&attention, &device, lengths));
  void* const keys = scratch.take(heads * rows * head_dim * bytes);
  void* const values = scratch.take(heads * rows * head_dim * bytes);
  const Handle<OrtValue> past_key = scratch.tensor(type_, keys, {1, heads, rows, head_dim});
  const Handle<OrtValue> past_value = scratch.tensor(type_, values, {1, heads, rows, head_dim});
  auto total = static_cast<int32_t>(rows);
  const Handle<OrtValue> total_length = cpu_tensor(ElementType::kInt32, &total, {});
  Handle<OrtValue> head_sink;
  if (attention.head_sink != nullptr) head_sink = scratch.tensor(type_, attention.head_sink, {attention.num_heads});

  const void* queries = call.query.data;
  const bool packed = call.packed || call.needs_preparation();
  if (call.needs_preparation()) {
    const int64_t count = call.batch * tokens * row;
    void* const narrowed = scratch.take(count * bytes);
    const auto* prepared = static_cast<const float*>(attention.query.data);
    check_kernel(skv_cuda_narrow(prepared, count, device.output_type, narrowed, device.stream));
    queries = narrowed;
  }

  for (int64_t b = 0; b < call.batch; ++b) {
    const auto part = [&](const void* data, int64_t width) {
      return scratch.tensor(type_, static_cast<const uint8_t*>(data) + b * tokens * width * bytes, {1, tokens, width});
    };
    check_kernel(skv_cuda_dense_rows(&attention, &device, static_cast<int32_t>(b), rows, keys, values));
    const Handle<OrtValue> query = part(queries, packed ? row : hidden);
    Handle<OrtValue> key, value;
    if (!packed) {
      key = part(call.key.data, kv_hidden);
      value = part(call.value.data, kv_hidden);
    }
    const Handle<OrtValue> output = part(attention.output, hidden);
    const Handle<OrtValue> seqlens_k = scratch.tensor(ElementType::kInt32, lengths + b, {1});
    const OrtValue* inputs[kGqaInputs] = {query.get(), key.get(), value.get(), past_key.get(), past_value.get()};
    inputs[kGqaSeqlensK] = seqlens_k.get();
    inputs[kGqaTotalLength] = total_length.get();
    inputs[kGqaHeadSink] = head_sink.get();
    OrtValue* outputs[kGqaOutputs] = {output.get(), past_key.get(), past_value.get()};
    if (OrtStatus* status = api().InvokeOp(context, op_.get(), inputs, kGqaInputs, outputs, kGqaOutputs)) {
      log_.write(Severity::kWarning, std::string("prompts take the op's own kernel: GroupQueryAttention says ") +
                                         api().GetErrorMessage(status));
      api().ReleaseStatus(status);
      refused_ = true;
      return false;
    }
  }
  check_kernel(skv_cuda_clear_padding(&attention, &device));
  return true;
}

}  // namespace skv::ort
