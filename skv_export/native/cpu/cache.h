// Shared by append and attention: the shape of a tile, rows in the cache's basis, and splitting work over threads.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <memory>
#include <new>

#include "cpu/isa.h"
#include "kernels.h"

namespace skv {

TileShape make_shape(const SkvLayout& layout);

// A head's new token, [head_dim] of `type`, as attention sees it: float32, padded, rotated.
void prepare_row(const SkvLayout& layout, int type, const void* source, float* row);

// Memory of one worker of append_head, in floats.
int64_t append_scratch(const SkvCache& cache);

// Appends `added` tokens to the block of KV head `head` (reference: append). `tokens` points to the head's first token,
// `stride` elements of `type` apart. Returns whether numbers were not finite (stored as 0).
bool append_head(const SkvCache& cache, uint8_t* block, int64_t head, int64_t past, int64_t added, int type,
                 const void* tokens, int64_t stride, float* scratch);

// Appends a checked call's keys and values. Throws std::bad_alloc before anything is written.
int append_call(const SkvAttention& call, const SkvThreads* threads);

inline const void* element(const void* data, int type, int64_t index) {
  return static_cast<const uint8_t*>(data) + index * type_bytes(type);
}

// One of the matrices of calibrated keys for KV head h; null where there is none.
inline const float* of_head(const float* matrices, const SkvLayout& layout, int64_t h) {
  return matrices ? matrices + h * padded_dim(layout) * padded_dim(layout) : nullptr;
}

inline uint8_t* block_of(const SkvCache& cache, int64_t kv_num_heads, int64_t b, int64_t h) {
  return cache.data + (b * kv_num_heads + h) * cache.block_bytes;
}

inline int64_t num_threads(const SkvThreads* threads) {
  return threads && threads->run && threads->num_threads > 1 ? threads->num_threads : 1;
}

// Runs body(i) for i in [0, count); `worth` says whether the work is worth waking other threads.
template <class Body>
void parallel_for(const SkvThreads* threads, int64_t count, bool worth, const Body& body) {
  if (!worth || count < 2 || num_threads(threads) == 1) {
    for (int64_t i = 0; i < count; i++) body(i);
    return;
  }
  const auto call = [](void* context, size_t i) { (*static_cast<const Body*>(context))(static_cast<int64_t>(i)); };
  threads->run(threads->pool, call, static_cast<size_t>(count), const_cast<Body*>(&body));
}

// Floats on a 64-byte boundary, not initialized. Throws std::bad_alloc.
class Floats {
 public:
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(::operator new(sizeof(float) * std::max<int64_t>(count, 1), std::align_val_t{64}))) {}
  ~Floats() { ::operator delete(data_, std::align_val_t{64}); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

}  // namespace skv
