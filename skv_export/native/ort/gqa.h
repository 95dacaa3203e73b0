// Creates ONNX Runtime's own GroupQueryAttention for a node; prompts go through it, on the CPU (ort/prefill.h) and on
// the GPU (ort/prefill_cuda.h).
#pragma once
#include "ort/op.h"

namespace skv::ort {

// Its inputs up to head_sink; its outputs are the rows, present_key and present_value.
enum GqaInput : size_t { kGqaSeqlensK = 5, kGqaTotalLength = 6, kGqaHeadSink = 11, kGqaInputs = 12 };
constexpr int kGqaOutputs = 3;

// With the node's heads, window, scale and softcap, on the node's provider; a node without a window gets `no_window`.
// Null, and a warning in the log, where this ONNX Runtime has none for the type.
Handle<OrtOp> make_gqa(const OrtKernelInfo* info, const Attributes& attributes, ElementType type, const Log& log,
                       int64_t no_window = -1);

}  // namespace skv::ort
