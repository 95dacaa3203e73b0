// Append, dequantize and rewind (spec/reference.py: append, load, rewind), with the unit's codec.
#include "cpu/cache.h"

#include <math.h>
#include <string.h>

#include <atomic>

#include "cpu/checks.h"

namespace skv {
namespace {

// One block seen through its layout.
class Block {
 public:
  Block(const SkvCache& cache, uint8_t* data)
      : layout_(cache.layout),
        data_(data),
        rows_(data + cache.block_bytes - full_bytes(cache.layout)),
        tiles_(tiles_in(cache.layout, cache.block_bytes)) {}

  // Only for tiles that the ring holds; there is at least one slot then.
  uint8_t* tile(int64_t index) const { return data_ + index % tiles_ * tile_bytes(layout_); }
  uint8_t* row(int64_t position) const { return rows_ + full_row(layout_, position) * row_bytes(layout_); }
  int64_t tiles() const { return tiles_; }

 private:
  const SkvLayout& layout_;
  uint8_t* data_;
  uint8_t* rows_;
  int64_t tiles_;
};

// As prepare_row, with not-finite numbers as 0; returns whether there were any.
bool stored_row(const SkvLayout& layout, int type, const void* source, float* row) {
  unit().load_row(type, source, row, layout.head_dim);
  bool not_finite = false;
  for (int d = 0; d < layout.head_dim; d++) {
    if (isfinite(row[d])) continue;
    row[d] = 0;
    not_finite = true;
  }
  const int dim = padded_dim(layout);
  for (int d = layout.head_dim; d < dim; d++) row[d] = 0;
  if (layout.rotation == SKV_HADAMARD) unit().rotate(row, dim, rotation_dim(layout));
  return not_finite;
}

// A tile's content [T][D] in the basis of its channels, saturated (reference: KeyBasis.to_tile).
void turn_into_tile(const float* key_basis, const TileShape& shape, const float* content, float* turned) {
  constexpr float kMost = 65504.0f;
  unit().multiply(key_basis, shape.dim, content, shape.tile_tokens, turned);
  for (int i = 0; i < shape.tile_tokens * shape.dim; i++) {
    const float low = turned[i] > -kMost ? turned[i] : -kMost;  // of what is not a number, the lower end
    turned[i] = low < kMost ? low : kMost;
  }
}

// Reads tiles of one head back in the model's basis (reference: decode_tile).
class TileReader {
 public:
  TileReader(const SkvCache& cache, int64_t head)
      : shape_(make_shape(cache.layout)), content_(tile_floats()), turned_(cache.basis.query ? tile_floats() : 0) {
    if (!cache.basis.query) return;
    const float* query_basis = of_head(cache.basis.query, cache.layout, head);
    inverse_ = std::make_unique<Floats>(int64_t{shape_.dim} * shape_.dim);
    for (int64_t i = 0; i < shape_.dim; i++) {
      for (int64_t j = 0; j < shape_.dim; j++) inverse_->get()[j * shape_.dim + i] = query_basis[i * shape_.dim + j];
    }
  }

  const TileShape& shape() const { return shape_; }
  // Rows [T][D], which the caller may change; they stand until the next call.
  float* content() const { return inverse_ ? turned_.get() : content_.get(); }
  void read(const uint8_t* tile) const {
    unit().decode_tile(&shape_, tile, content_.get());
    if (inverse_) unit().multiply(inverse_->get(), shape_.dim, content_.get(), shape_.tile_tokens, turned_.get());
  }

 private:
  int64_t tile_floats() const { return int64_t{shape_.tile_tokens} * shape_.dim; }

  const TileShape shape_;
  const Floats content_, turned_;
  std::unique_ptr<Floats> inverse_;  // of the key basis: the query basis transposed
};

}  // namespace

TileShape make_shape(const SkvLayout& l) {
  TileShape s = {};
  s.dim = padded_dim(l);
  s.rotation_dim = rotation_dim(l);
  s.bits = l.bits;
  s.channel = l.granularity == SKV_CHANNEL;
  s.byte_channels = s.channel && l.parameter_bits == 8;
  s.group_size = s.channel ? s.dim : l.group_size;
  s.tile_tokens = l.tile_tokens;
  s.row_type = l.recent_type;
  s.is_value = l.is_value != 0;
  s.parameters = code_bytes(l);
  if (l.granularity == SKV_TOKEN_CHANNEL && l.bits != 16) {
    s.means = s.parameters + int64_t{2} * num_groups(l) * l.tile_tokens;
  }
  s.tile_bytes = tile_bytes(l);
  // Planes of 8, 4, 2, 1 bits, high bits first: 3 = 2+1, 5 = 4+1, 6 = 4+2.
  int64_t offset = 0;
  for (int width = 8, left = l.bits == 16 ? 0 : l.bits; left > 0; width /= 2) {
    if (left < width) continue;
    left -= width;
    s.planes[s.num_planes++] = {width, left, offset};
    offset += int64_t{l.tile_tokens} * s.dim * width / 8;
  }
  return s;
}

void prepare_row(const SkvLayout& layout, int type, const void* source, float* row) {
  const int dim = padded_dim(layout);
  unit().load_row(type, source, row, layout.head_dim);
  std::fill(row + layout.head_dim, row + dim, 0.0f);
  if (layout.rotation == SKV_HADAMARD) unit().rotate(row, dim, rotation_dim(layout));
}

int64_t append_scratch(const SkvCache& cache) {
  const int64_t tile = int64_t{cache.layout.tile_tokens} * padded_dim(cache.layout);
  return cache.basis.key ? 2 * tile : tile;
}

bool append_head(const SkvCache& cache, uint8_t* data, int64_t head, int64_t past, int64_t added, int type,
                 const void* tokens, int64_t stride, float* scratch) {
  const SkvLayout& l = cache.layout;
  const TileShape shape = make_shape(l);
  const Block block(cache, data);
  const int64_t length = past + added, dim = shape.dim;
  bool not_finite = false;
  // Tiles first: their older tokens are still in the ring.
  const int64_t first = quantized_tokens(l, past) / l.tile_tokens, last = quantized_tokens(l, length) / l.tile_tokens;
  for (int64_t tile = std::max(first, last - block.tiles()); tile < last; tile++) {
    for (int64_t t = 0; t < l.tile_tokens; t++) {
      const int64_t position = l.num_sink_tokens + tile * l.tile_tokens + t;
      float* row = scratch + t * dim;
      if (position < past) {
        unit().load_row(l.recent_type, block.row(position), row, shape.dim);
        continue;
      }
      not_finite |= stored_row(l, type, element(tokens, type, (position - past) * stride), row);
      // Tiles are made of what the ring holds, so that the bytes do not depend on how the tokens came.
      uint8_t rounded[kMaxDim * sizeof(float)];
      unit().store_row(l.recent_type, row, rounded, shape.dim);
      unit().load_row(l.recent_type, rounded, row, shape.dim);
    }
    const float* content = scratch;
    if (cache.basis.key) {
      float* turned = scratch + int64_t{l.tile_tokens} * dim;
      turn_into_tile(of_head(cache.basis.key, l, head), shape, scratch, turned);
      content = turned;
    }
    unit().encode_tile(&shape, of_head(cache.basis.feedback, l, head), content, block.tile(tile));
  }
  for (int64_t position = past; position < length; position++) {
    if (position >= l.num_sink_tokens && position < length - ring_tokens(l)) continue;
    not_finite |= stored_row(l, type, element(tokens, type, (position - past) * stride), scratch);
    unit().store_row(l.recent_type, scratch, block.row(position), shape.dim);
  }
  return not_finite;
}

int append_call(const SkvAttention& c, const SkvThreads* threads) {
  // One job per head and tensor, each worker with scratch of its own.
  const int64_t jobs = 2 * int64_t{c.batch} * c.kv_num_heads;
  bool flushes = false;
  for (int64_t b = 0; b < c.batch; b++) {
    const int64_t total = total_tokens(c, b), past = total - new_tokens(c, b);
    flushes |= quantized_tokens(c.key_cache.layout, total) != quantized_tokens(c.key_cache.layout, past);
  }
  const int64_t workers = std::min(jobs, 4 * num_threads(threads));
  const int64_t scratch_floats = append_scratch(c.key_cache);
  const Floats scratch(workers * scratch_floats);
  std::atomic<bool> not_finite{false};
  parallel_for(threads, workers, flushes || int64_t{c.tokens} * jobs > 256, [&](int64_t worker) {
    for (int64_t job = worker; job < jobs; job += workers) {
      const int64_t b = job / 2 / c.kv_num_heads, h = job / 2 % c.kv_num_heads, added = new_tokens(c, b);
      if (added == 0) continue;
      const SkvCache& cache = job % 2 ? c.value_cache : c.key_cache;
      const SkvTokens& tokens = job % 2 ? c.value : c.key;
      const int64_t at = b * c.tokens * tokens.token_stride + h * cache.layout.head_dim;
      const bool bad =
          append_head(cache, block_of(cache, c.kv_num_heads, b, h), h, total_tokens(c, b) - added, added, c.type,
                      element(tokens.data, c.type, at), tokens.token_stride, scratch.get() + worker * scratch_floats);
      if (bad) not_finite.store(true, std::memory_order_relaxed);
    }
  });
  if (c.not_finite) *c.not_finite = not_finite.load();
  return SKV_OK;
}

namespace {

int check_position(const SkvCache* cache, const char* function, int32_t kv_num_heads, int32_t b, int32_t h) {
  if (cache == nullptr) return fail(SKV_INVALID_ARGUMENT, "%s: cache; got null; expected a pointer", function);
  if (int status = check_cache(*cache, cache->layout.is_value == 1 ? "value" : "key")) return status;
  if (b >= 0 && kv_num_heads > 0 && h >= 0 && h < kv_num_heads) return SKV_OK;
  return fail(SKV_INVALID_ARGUMENT, "%s: sequence and head; got %d and %d of %d heads; expected one that exists",
              function, b, h, kv_num_heads);
}

// Rows of one block in the model's basis.
void dequantize(const SkvCache& cache, uint8_t* data, int64_t head, int64_t length, int type, void* out,
                int64_t stride) {
  const SkvLayout& l = cache.layout;
  const Block block(cache, data);
  const TileReader reader(cache, head);
  const TileShape& shape = reader.shape();
  float* content = reader.content();
  const auto write = [&](int64_t position, float* row) {
    if (l.rotation == SKV_HADAMARD) unit().rotate(row, shape.dim, shape.rotation_dim);
    unit().store_row(type, row, const_cast<void*>(element(out, type, position * stride)), l.head_dim);
  };
  const int64_t sinks = l.num_sink_tokens, tiles = quantized_tokens(l, length) / l.tile_tokens;
  for (int64_t tile = 0; tile < tiles; tile++) {
    const bool held = tile >= tiles - block.tiles();
    if (held)
      reader.read(block.tile(tile));
    else
      std::fill(content, content + int64_t{l.tile_tokens} * shape.dim, 0.0f);
    for (int64_t t = 0; t < l.tile_tokens; t++) write(sinks + tile * l.tile_tokens + t, content + t * shape.dim);
  }
  for (int64_t position = 0; position < length; position++) {
    if (position == sinks) position += tiles * l.tile_tokens;
    if (position >= length) break;
    unit().load_row(l.recent_type, block.row(position), content, shape.dim);
    write(position, content);
  }
}

}  // namespace
}  // namespace skv

using namespace skv;

extern "C" int skv_append(const SkvAttention* call, const SkvThreads* threads) {
  if (call == nullptr) return fail(SKV_INVALID_ARGUMENT, "skv_append: call; got null; expected a pointer");
  if (int status = check_call(*call, true)) return status;
  try {
    return append_call(*call, threads);
  } catch (const std::bad_alloc&) {
    return fail(SKV_RUNTIME_ERROR, "skv_append: out of memory");
  }
}

extern "C" int skv_dequantize(const SkvCache* cache, int32_t kv_num_heads, int32_t b, int32_t h, int64_t length,
                              int32_t type, void* out, int64_t row_stride) {
  if (int status = check_position(cache, "skv_dequantize", kv_num_heads, b, h)) return status;
  if (length < 0 || length > kMaxLength) {
    return fail(SKV_INVALID_ARGUMENT, "skv_dequantize: length; got %lld; expected 0 ... %lld",
                static_cast<long long>(length), static_cast<long long>(kMaxLength));
  }
  const char* tensor = cache->layout.is_value ? "value" : "key";
  if (int status = check_capacity(*cache, tensor, b, length)) return status;
  if (type < SKV_FLOAT16 || type > SKV_BFLOAT16) {
    return fail(SKV_INVALID_ARGUMENT, "skv_dequantize: type; got %d; expected an SkvType", type);
  }
  if (length > 0 && (out == nullptr || row_stride < cache->layout.head_dim)) {
    return fail(SKV_INVALID_ARGUMENT, "skv_dequantize: out; got %p with rows of %lld; expected a pointer, rows of %d",
                out, static_cast<long long>(row_stride), cache->layout.head_dim);
  }
  try {
    dequantize(*cache, block_of(*cache, kv_num_heads, b, h), h, length, type, out, row_stride);
    return SKV_OK;
  } catch (const std::bad_alloc&) {
    return fail(SKV_RUNTIME_ERROR, "skv_dequantize: out of memory");
  }
}

extern "C" int skv_decode_tile(const SkvLayout* layout, const uint8_t* tile, float* out) {
  if (layout == nullptr || tile == nullptr || out == nullptr) {
    return fail(SKV_INVALID_ARGUMENT, "skv_decode_tile: got null; expected three pointers");
  }
  if (int status = check_layout(*layout, layout->is_value == 1 ? "value" : "key")) return status;
  const TileShape shape = make_shape(*layout);
  unit().decode_tile(&shape, tile, out);
  return SKV_OK;
}

extern "C" int skv_rewind(const SkvCache* cache, int32_t kv_num_heads, int32_t b, int64_t length,
                          int64_t longest_length, int64_t new_length) {
  if (int status = check_position(cache, "skv_rewind", kv_num_heads, b, 0)) return status;
  const SkvLayout& l = cache->layout;
  if (length < 0 || longest_length < length || longest_length > kMaxLength) {
    return fail(SKV_INVALID_ARGUMENT, "skv_rewind: length and longest_length; got %lld and %lld; expected 0 ... %lld",
                static_cast<long long>(length), static_cast<long long>(longest_length),
                static_cast<long long>(kMaxLength));
  }
  if (int status = check_capacity(*cache, l.is_value ? "value" : "key", b, longest_length)) return status;
  const int64_t floor = rewind_floor(l, cache->block_bytes, length, longest_length);
  if (new_length < floor || new_length > length) {
    return fail(SKV_INVALID_ARGUMENT, "rewind from %lld tokens; got %lld; expected %lld ... %lld (recent_tokens = %d)",
                static_cast<long long>(length), static_cast<long long>(new_length), static_cast<long long>(floor),
                static_cast<long long>(length), l.recent_tokens);
  }
  const int64_t first = quantized_tokens(l, new_length) / l.tile_tokens,
                last = quantized_tokens(l, length) / l.tile_tokens;
  if (first == last) return SKV_OK;
  try {
    for (int64_t h = 0; h < kv_num_heads; h++) {
      const TileReader reader(*cache, h);
      const Block block(*cache, block_of(*cache, kv_num_heads, b, h));
      for (int64_t tile = first; tile < last; tile++) {
        reader.read(block.tile(tile));
        for (int64_t t = 0; t < l.tile_tokens; t++) {
          const int64_t position = l.num_sink_tokens + tile * l.tile_tokens + t;
          if (position >= longest_length - ring_tokens(l)) continue;  // its row has not been overwritten
          unit().store_row(l.recent_type, reader.content() + t * reader.shape().dim, block.row(position),
                           reader.shape().dim);
        }
      }
    }
    return SKV_OK;
  } catch (const std::bad_alloc&) {
    return fail(SKV_RUNTIME_ERROR, "skv_rewind: out of memory");
  }
}

extern "C" int skv_layout_sizes(const SkvLayout* layout, int64_t block_bytes, int64_t length, int64_t out[6]) {
  if (layout == nullptr || out == nullptr) {
    return fail(SKV_INVALID_ARGUMENT, "skv_layout_sizes: got null; expected two pointers");
  }
  if (int status = check_layout(*layout, layout->is_value == 1 ? "value" : "key")) return status;
  if (length < 0 || length > kMaxLength) {
    return fail(SKV_INVALID_ARGUMENT, "skv_layout_sizes: length; got %lld; expected 0 ... %lld",
                static_cast<long long>(length), static_cast<long long>(kMaxLength));
  }
  out[0] = tile_bytes(*layout);
  out[1] = row_bytes(*layout);
  out[2] = full_rows(*layout);
  out[3] = tiles_in(*layout, block_bytes);
  out[4] = capacity(*layout, block_bytes);
  out[5] = quantized_tokens(*layout, length);
  return SKV_OK;
}
