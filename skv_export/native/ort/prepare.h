// Preparation of a call's new tokens on the CPU: QK norm and RoPE, exactly as in spec/reference.py.
#pragma once
#include "ort/op.h"

namespace skv::ort {

// New tokens as attention takes them; `type` is the node's, or float where they have been worked on.
struct NewTokens {
  SkvTokens query, key, value;
  SkvType type;
  bool packed;  // query, key and value are parts of one row
};

// The inputs as they are, before any preparation.
NewTokens tokens_in_place(const Call& call);

// A float copy of the inputs, packed [batch][tokens][(N + 2 N_kv) * head_dim], after QK norm and RoPE; rows of padding
// are left unset. `lengths` is the same call with checked lengths. Throws Error where a position is beyond cos_cache.
NewTokens prepare_tokens(const Call& call, const SkvAttention& lengths, OrtKernelContext* context, Scratch& scratch);

// float16 to float and back (to nearest even, beyond its range infinite).
void half_to_float(const uint16_t* source, float* target, int64_t count);
void float_to_half(const float* source, uint16_t* target, int64_t count);

}  // namespace skv::ort
