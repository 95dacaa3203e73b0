// Runs recorded calls of skv_attention without Python: for processors that are emulated. See test_instruction_sets.py.
//   replay IN OUT: prints the instruction set. IN: count, then calls: the struct's bytes, pointers replaced by 1 + the
//   index of a buffer, and the buffers as (size, bytes). OUT: the status and the buffers of each call, sizes left out.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "kernels.h"

#if defined(_WIN32)
#include <malloc.h>
static void* aligned_alloc(size_t alignment, size_t size) { return _aligned_malloc(size, alignment); }
#define free _aligned_free
#endif

namespace {

template <class T>
T take(FILE* file) {
  T value;
  if (fread(&value, sizeof(value), 1, file) != 1) abort();
  return value;
}

template <class T>
void relocate(T*& pointer, const std::vector<uint8_t*>& buffers) {
  const auto index = reinterpret_cast<uintptr_t>(pointer);
  pointer = index ? reinterpret_cast<T*>(buffers.at(index - 1)) : nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
  if (!in || !out) return 2;
  for (int64_t calls = take<int64_t>(in); calls > 0; calls--) {
    auto call = take<SkvAttention>(in);
    std::vector<uint8_t*> buffers;
    std::vector<size_t> sizes;
    for (int64_t count = take<int64_t>(in); count > 0; count--) {
      sizes.push_back(static_cast<size_t>(take<int64_t>(in)));
      buffers.push_back(static_cast<uint8_t*>(aligned_alloc(64, (sizes.back() + 63) / 64 * 64)));
      if (fread(buffers.back(), 1, sizes.back(), in) != sizes.back()) abort();
    }
    relocate(call.key_cache.data, buffers);
    relocate(call.key_cache.basis.key, buffers);
    relocate(call.key_cache.basis.query, buffers);
    relocate(call.key_cache.basis.feedback, buffers);
    relocate(call.value_cache.data, buffers);
    relocate(call.query.data, buffers);
    relocate(call.key.data, buffers);
    relocate(call.value.data, buffers);
    relocate(call.output, buffers);
    relocate(call.seqlens_k, buffers);
    relocate(call.query_seqlens, buffers);
    relocate(call.head_sink, buffers);
    relocate(call.not_finite, buffers);
    const int64_t status = skv_attention(&call, nullptr);
    fwrite(&status, sizeof(status), 1, out);
    for (size_t i = 0; i < buffers.size(); i++) fwrite(buffers[i], 1, sizes[i], out);
    for (uint8_t* buffer : buffers) free(buffer);
  }
  printf("%s\n", skv_cpu_isa());
  return fclose(out) == 0 ? 0 : 1;
}
