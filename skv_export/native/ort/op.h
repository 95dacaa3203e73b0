// The op skv::QuantizedKVAttention in ONNX Runtime, for any provider: its attributes, its inputs and their shapes, and
// the definition that is registered. A provider implements a Kernel and a Definition (ort/kernel_cpu.cc,
// ort/kernel_cuda.cc).
#pragma once
#include "kernels.h"
#include "ort/runtime.h"

namespace skv::ort {

enum Input : size_t {
  kQuery,
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kSeqlensK,
  kTotalSequenceLength,
  kCosCache,
  kSinCache,
  kPositionIds,
  kAttentionBias,
  kHeadSink,
  kReserved12,
  kReserved13,
  kQNormWeight,
  kKNormWeight,
  kQuerySeqlens,
  kKeyBasis,
  kQueryBasis,
  kKeyFeedback,
  kNumInputs,
};
enum Output : size_t { kOutput, kPresentKey, kPresentValue, kNumOutputs };

// The node's attributes (docs/spec.md, Attributes), read and checked once. The layouts' head_dim, and a group size that
// the node leaves open, follow from the query's shape.
struct Attributes {
  int32_t num_heads, kv_num_heads;
  float scale;    // 0 = 1 / sqrt(head_dim)
  float softcap;  // 0 = none
  float qk_norm_epsilon;
  bool do_rotary, rotary_interleaved;
  SkvLayout key_layout, value_layout;  // local_window_size: 0 = none

  // Throws Error: an attribute is missing, of another type, or has a value that can't be.
  static Attributes read(const OrtKernelInfo* info);

  // head_dim as far as the graph tells it; 0 = not known before a call.
  int64_t known_head_dim(const OrtKernelInfo* info) const;

  // Sets head_dim and the group sizes that follow from it. Throws Error where they don't fit each other.
  void set_head_dim(int64_t head_dim);

 private:
  void check_known_shapes(const OrtKernelInfo* info) const;
};

// One call's tensors, shapes and types checked; nothing behind a data pointer has been read, so it may be any device's.
struct Call {
  Attributes attributes;  // with head_dim
  ElementType type;       // of query, output and all else that is T
  int32_t batch, tokens, head_dim;
  bool packed;  // query holds keys and values too
  Tensor query, key, value, past_key, past_value, seqlens_k, total_sequence_length;
  Tensor cos_cache, sin_cache, position_ids, head_sink, q_norm_weight, k_norm_weight, query_seqlens;
  SkvKeyBasis basis;  // of the keys; its pointers are of the device that computes

  Call(OrtKernelContext* context, const Attributes& node_attributes, ElementType node_type);

  bool needs_preparation() const { return attributes.do_rotary || q_norm_weight || k_norm_weight; }
  int64_t hidden_size() const { return int64_t{attributes.num_heads} * head_dim; }
  int64_t kv_hidden_size() const { return int64_t{attributes.kv_num_heads} * head_dim; }
  int64_t row_size() const { return hidden_size() + 2 * kv_hidden_size(); }  // a token's queries, keys and values
};

// Where a call's caches are: the presents; or the pasts, and nothing is appended, where the node leaves out both.
struct CacheBuffers {
  uint8_t *key, *value;
  bool appends;

  CacheBuffers(OrtKernelContext* context, const Call& call);
};

// Throws what a function of kernels.h, or of kernels_cuda.h, returned, if it failed; `reason` says why.
void check_status(int status, const char* (*reason)());

// What computes a node. Made once per node; compute is called from several threads where a session runs several calls.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(OrtKernelContext* context) = 0;  // throws Error
};

// The op for one provider and element type.
struct Definition : CustomOp {
  using Make = std::unique_ptr<Kernel> (*)(const OrtKernelInfo* info, ElementType type);
  Definition(const char* provider, ElementType type, Make make);

  const char* provider;
  ElementType type;
  Make make;
};

// What ort/kernel_cuda.cc registers, in a library that is built with CUDA (SKV_WITH_CUDA). The definitions live as long
// as the process.
std::vector<const Definition*> cuda_definitions();

}  // namespace skv::ort
