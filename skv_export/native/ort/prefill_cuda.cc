// Implementation of ort/prefill_cuda.h.
//
// No length is known on the host, so each sequence is attended to as if all rows of a piece were new tokens, behind its
// past and the pieces before: what stands in rows of padding is seen by no other row, and their output is cleared at
// the end.
//
// GroupQueryAttention is given numbers only: where it splits the context, a key that is none takes its whole split out
// of the sum, and a value that is none reaches rows that must not see it. The outputs that see such a token are made up
// for at the end. Rows that are nobody's are 0: cuDNN's attention, which an environment variable still asks for,
// multiplies them by weights of 0.
#include "ort/prefill_cuda.h"

#include <algorithm>

#include "layout_check.h"
#include "ort/gqa.h"

namespace skv::ort {
namespace {

// Each sequence is a few launches of its own, some ten microseconds: with fewer tokens the op's own kernels take all
// sequences at once.
constexpr int64_t kFewestTokens = 64, kFewestPerSequence = 32;

// From here on ONNX Runtime takes cuDNN's attention where there is no window, softcap or head sink, and builds a plan
// for each new shape in each layer: 20 ms a layer on an H100, for every prompt of another length. A window that nothing
// is behind leaves it to FlashAttention.
constexpr int kCudnnArchitecture = 90;
bool takes_cudnn(const Attributes& attributes, int architecture) {
  return architecture >= kCudnnArchitecture && attributes.softcap == 0;
}

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
CudaPrefill::CudaPrefill(const OrtKernelInfo* info, const Attributes& attributes, ElementType type, int architecture,
                         const Log& log)
    : op_(type == ElementType::kFloat
              ? nullptr
              : make_gqa(info, attributes, type, log, takes_cudnn(attributes, architecture) ? kMaxWindow : -1)),
      type_(type),
      log_(log) {}

bool CudaPrefill::can_run(const Call& call) const {
  const int64_t fewest = std::max(kFewestTokens, kFewestPerSequence * call.batch);
  return call.tokens >= fewest && op_ != nullptr && !refused_ && call.head_dim % 8 == 0;
}

void prepare_tokens(const Call& call, const int64_t* position_ids, float* rows, void* stream, SkvAttention& attention) {
  SkvCudaPreparation p{};
  p.query = attention.query;
  p.key = attention.key;
  p.value = attention.value;
  p.type = attention.type;
  p.batch = attention.batch;
  p.tokens = attention.tokens;
  p.num_heads = call.attributes.num_heads;
  p.kv_num_heads = call.attributes.kv_num_heads;
  p.head_dim = call.head_dim;
  p.seqlens_k = attention.seqlens_k;
  p.query_seqlens = attention.query_seqlens;
  if (call.attributes.do_rotary) {
    p.cos_cache = call.cos_cache.data;
    p.sin_cache = call.sin_cache.data;
    p.rotary_rows = call.cos_cache.shape[0];
    p.rotary_half = static_cast<int32_t>(call.cos_cache.shape[1]);
    p.rotary_interleaved = call.attributes.rotary_interleaved;
    p.position_ids = position_ids;
  }
  p.q_norm_weight = call.q_norm_weight.data;
  p.k_norm_weight = call.k_norm_weight.data;
  p.epsilon = call.attributes.qk_norm_epsilon;
  check_kernel(skv_cuda_prepare(&p, rows, stream));
  const int64_t row = call.row_size();
  attention.query = {rows, row};
  attention.key = {rows + call.hidden_size(), row};
  attention.value = {rows + call.hidden_size() + call.kv_hidden_size(), row};
  attention.type = SKV_FLOAT;
}

namespace {

// `count` tokens of sequence b from the `first` on as a call of their own, with lengths as skv_cuda_piece_lengths gives
// them.
SkvAttention piece_of(const SkvAttention& attention, int64_t b, int64_t first, int64_t count, const int32_t* lengths) {
  SkvAttention piece = attention;
  const int64_t token = b * attention.tokens + first, bytes = type_bytes(attention.type);
  const auto moved = [&](const SkvTokens& all) {
    return SkvTokens{static_cast<const uint8_t*>(all.data) + token * all.token_stride * bytes, all.token_stride};
  };
  piece.query = moved(attention.query);
  piece.key = moved(attention.key);
  piece.value = moved(attention.value);
  const int64_t width = int64_t{attention.num_heads} * attention.key_cache.layout.head_dim;
  piece.output = static_cast<uint8_t*>(attention.output) + token * width * bytes;
  for (SkvCache* cache : {&piece.key_cache, &piece.value_cache}) {
    cache->data += b * attention.kv_num_heads * cache->block_bytes;
  }
  piece.seqlens_k = lengths + b;
  piece.query_seqlens = lengths + attention.batch + b;
  piece.batch = 1;
  piece.tokens = static_cast<int32_t>(count);
  return piece;
}

}  // namespace

bool CudaPrefill::run(OrtKernelContext* context, const Call& call, const SkvAttention& attention, bool appends,
                      const SkvCudaContext& device, DeviceScratch& scratch) {
  constexpr int64_t kMask = 32;  // tokens of a mask's word
  const int64_t tokens = call.tokens, heads = attention.kv_num_heads, head_dim = call.head_dim, row = call.row_size();
  const int64_t piece_tokens = std::min(tokens, kPiece), pieces = (tokens + piece_tokens - 1) / piece_tokens;
  const int64_t bytes = type_bytes(device.output_type), chunks = (tokens + kMask - 1) / kMask;
  const int64_t mask_words = (attention.num_heads + 2 * heads) * chunks;
  const int64_t rows = device.max_length + piece_tokens;  // any past, and a piece behind it
  auto* lengths = static_cast<int32_t*>(scratch.take(pieces * 3 * call.batch * int64_t{sizeof(int32_t)}));
  auto* masks = static_cast<uint32_t*>(scratch.take(call.batch * mask_words * int64_t{sizeof(uint32_t)}));
  void* const keys = scratch.take(heads * rows * head_dim * bytes);
  void* const values = scratch.take(heads * rows * head_dim * bytes);
  void* const packed = scratch.take(piece_tokens * row * bytes);
  float* prepared = nullptr;
  if (call.needs_preparation()) {
    prepared = static_cast<float*>(scratch.take(piece_tokens * row * int64_t{sizeof(float)}));
  }
  check_kernel(skv_cuda_piece_lengths(&attention, &device, static_cast<int32_t>(piece_tokens), lengths));
  const Handle<OrtValue> past_key = scratch.tensor(type_, keys, {1, heads, rows, head_dim});
  const Handle<OrtValue> past_value = scratch.tensor(type_, values, {1, heads, rows, head_dim});
  auto total = static_cast<int32_t>(rows);
  const Handle<OrtValue> total_length = cpu_tensor(ElementType::kInt32, &total, {});
  Handle<OrtValue> head_sink;
  if (attention.head_sink != nullptr) head_sink = scratch.tensor(type_, attention.head_sink, {attention.num_heads});

  for (int64_t b = 0; b < call.batch; ++b) {
    check_kernel(skv_cuda_dense_rows(&attention, &device, static_cast<int32_t>(b), rows, keys, values));
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t first = i * piece_tokens, count = std::min(piece_tokens, tokens - first);
      const int32_t* const of_piece = lengths + i * 3 * call.batch;
      SkvAttention piece = piece_of(attention, b, first, count, of_piece);
      if (call.needs_preparation()) {
        const auto* ids = call.position_ids.as<int64_t>();
        prepare_tokens(call, ids ? ids + b * tokens + first : nullptr, prepared, device.stream, piece);
      }
      check_kernel(skv_cuda_pack_rows(&piece, &device, packed, masks + b * mask_words, static_cast<int32_t>(chunks),
                                      static_cast<int32_t>(first / kMask)));
      const Handle<OrtValue> query = scratch.tensor(type_, packed, {1, count, row});
      const Handle<OrtValue> output = scratch.tensor(type_, piece.output, {1, count, call.hidden_size()});
      const Handle<OrtValue> seqlens_k = scratch.tensor(ElementType::kInt32, of_piece + 2 * call.batch + b, {1});
      const OrtValue* inputs[kGqaInputs] = {query.get(), nullptr, nullptr, past_key.get(), past_value.get()};
      inputs[kGqaSeqlensK] = seqlens_k.get();
      inputs[kGqaTotalLength] = total_length.get();
      inputs[kGqaHeadSink] = head_sink.get();
      OrtValue* outputs[kGqaOutputs] = {output.get(), past_key.get(), past_value.get()};
      if (OrtStatus* status = api().InvokeOp(context, op_.get(), inputs, kGqaInputs, outputs, kGqaOutputs)) {
        const std::string reason = api().GetErrorMessage(status);
        api().ReleaseStatus(status);
        if (b > 0 || i > 0) throw Error(ErrorCode::kFail, "GroupQueryAttention within a prompt: " + reason);
        log_.write(Severity::kWarning, "prompts take the op's own kernel: GroupQueryAttention says " + reason);
        refused_ = true;
        return false;
      }
      if (appends) check_kernel(skv_cuda_append(&piece, &device));  // nothing reads this sequence's cache any more
    }
  }
  check_kernel(skv_cuda_finish_rows(&attention, &device, masks));
  return true;
}

}  // namespace skv::ort
