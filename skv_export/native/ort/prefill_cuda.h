// Scratch memory of a call on the device, QK norm and RoPE, and attention of many new tokens there: ONNX Runtime's own
// GroupQueryAttention (FlashAttention), invoked on one sequence at a time over its dequantized past, in pieces of so
// many tokens that what they take beside it stays small.
#pragma once
#include <atomic>

#include "cuda/kernels_cuda.h"
#include "ort/prepare.h"

// Tokens that go at a time, a multiple of 32; docs/gpu.md states the memory. The tests build with fewer.
#ifndef SKV_CUDA_PIECE
#define SKV_CUDA_PIECE 2048
#endif

namespace skv::ort {

// Throws what a function of kernels_cuda.h returned, if it failed.
void check_kernel(int status);

// Memory of the device that the query is on, from the provider's arena; given back when the call ends, which is in
// order on the call's stream: the arena gives no other stream what this one still works on.
class DeviceScratch {
 public:
  DeviceScratch(OrtKernelContext* context, void* stream);
  ~DeviceScratch();
  DeviceScratch(const DeviceScratch&) = delete;
  DeviceScratch& operator=(const DeviceScratch&) = delete;

  void* take(int64_t bytes);
  // A tensor over device memory.
  Handle<OrtValue> tensor(ElementType type, const void* data, const std::vector<int64_t>& shape) const;

 private:
  OrtKernelContext* const context_;
  void* const stream_;
  const OrtMemoryInfo* memory_ = nullptr;
  Handle<OrtAllocator> allocator_;
  std::vector<void*> blocks_;
};

// Replaces tokens by float rows after QK norm and RoPE. `position_ids`: theirs, or null. `rows` has room for them.
void prepare_tokens(const Call& call, const int64_t* position_ids, float* rows, void* stream, SkvAttention& attention);

class CudaPrefill {
 public:
  static constexpr const char* kPath = "GroupQueryAttention of ONNX Runtime";
  static constexpr int64_t kPiece = SKV_CUDA_PIECE;

  // Where ONNX Runtime has no GroupQueryAttention for the type, the log says so and can_run is false.
  CudaPrefill(const OrtKernelInfo* info, const Attributes& attributes, ElementType type, int architecture,
              const Log& log);

  // Many new tokens.
  bool can_run(const Call& call) const;

  // Attention of the call's tokens, as the node has them, and append where the node has presents. False, and a warning
  // in the log, where GroupQueryAttention refuses: nothing has been written then, and it is not asked again.
  bool run(OrtKernelContext* context, const Call& call, const SkvAttention& attention, bool appends,
           const SkvCudaContext& device, DeviceScratch& scratch);

 private:
  const Handle<OrtOp> op_;
  const ElementType type_;
  const Log log_;
  std::atomic<bool> refused_{false};
};

}  // namespace skv::ort
