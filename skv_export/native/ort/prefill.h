// Attention of many new tokens on the CPU: ONNX Runtime's own GroupQueryAttention, invoked on one sequence at a time
// over its dequantized past.
#pragma once
#include "ort/prepare.h"

namespace skv::ort {

class Prefill {
 public:
  // Where this build of ONNX Runtime has no GroupQueryAttention, the log says so and can_run is false.
  Prefill(const OrtKernelInfo* info, const Attributes& attributes, const Log& log);

  bool can_run(const Call& call) const { return op_ != nullptr && call.head_dim % 8 == 0; }

  // Writes the output rows [new_tokens][N * head_dim] of sequence b to `output`; the caches are only read.
  void attend(OrtKernelContext* context, const Call& call, const NewTokens& tokens, const SkvAttention& attention,
              int64_t b, int64_t past_tokens, int64_t new_tokens, float* output) const;

 private:
  Handle<OrtOp> op_;
};

}  // namespace skv::ort
