// Attention of a call: what each query sees, how the work is split over threads, and how partial results are merged.
//
// A head's past is cut into chunks of tiles; what stands in full precision (sinks, ring, new tokens) is one chunk more.
// Each chunk and block of query rows is an item: the unit computes its partial softmax, and the partials of a row are
// merged as in flash decoding. Items depend on the shapes alone, so results do not depend on the number of threads.
#include <math.h>
#include <string.h>

#include <vector>

#include "cpu/cache.h"
#include "cpu/checks.h"

namespace skv {
namespace {

constexpr int64_t kPassTokens = 64;  // query tokens handled together: bounds the memory for partials
constexpr int64_t kChunkTiles = 64;  // most tiles of an item
constexpr int64_t kMinChunkTiles = 4;
constexpr int64_t kItemsPerHeads = 32;  // items to aim at over all heads of a sequence

struct Item {
  int64_t b, h;
  int64_t first_row, rows;  // of the query rows of this head and pass, [token][head of the group]
  int64_t first_run, runs;  // of the head's list of runs
  int64_t partial;          // offset in the partials, in floats
  bool tiles;
};

struct Sequence {
  int64_t past, added;
  int64_t tiled;  // tokens in tiles
};

class Attention {
 public:
  Attention(const SkvAttention& call, const SkvThreads* threads)
      : c_(call),
        k_(call.key_cache.layout),
        v_(call.value_cache.layout),
        threads_(threads),
        key_shape_(make_shape(k_)),
        value_shape_(make_shape(v_)),
        dim_(key_shape_.dim),
        groups_(call.num_heads / call.kv_num_heads),
        scale_(call.scale > 0 ? call.scale : static_cast<float>(1 / sqrt(static_cast<double>(k_.head_dim)))),
        new_keys_(int64_t{call.batch} * call.kv_num_heads * call.tokens * dim_),
        new_values_(int64_t{call.batch} * call.kv_num_heads * call.tokens * dim_) {
    for (int64_t b = 0; b < c_.batch; b++) {
      const int64_t added = new_tokens(c_, b), past = total_tokens(c_, b) - added;
      sequences_.push_back({past, added, quantized_tokens(k_, past)});
    }
  }

  void run() {
    const bool large = int64_t{c_.tokens} * c_.batch * c_.kv_num_heads * dim_ > 32768;
    any_value_.assign(int64_t{c_.batch} * c_.kv_num_heads, 0);
    parallel_for(threads_, int64_t{c_.batch} * c_.kv_num_heads, large, [&](int64_t i) { prepare_new(i); });
    for (int64_t first = 0; first < c_.tokens; first += kPassTokens) {
      pass(first, std::min<int64_t>(kPassTokens, c_.tokens - first));
    }
  }

 private:
  int64_t seen_from(int64_t position) const {
    return k_.local_window_size > 0 ? std::max<int64_t>(0, position - k_.local_window_size + 1) : 0;
  }

  float* new_row(const Floats& rows, int64_t b, int64_t h, int64_t token) const {
    return rows.get() + ((b * c_.kv_num_heads + h) * c_.tokens + token) * dim_;
  }

  const void* token(const SkvTokens& tokens, int64_t b, int64_t t, int64_t head) const {
    return element(tokens.data, c_.type, (b * c_.tokens + t) * tokens.token_stride + head * k_.head_dim);
  }

  void prepare_new(int64_t i) {
    const int64_t b = i / c_.kv_num_heads, h = i % c_.kv_num_heads;
    bool finite = true;
    for (int64_t t = 0; t < sequences_[b].added; t++) {
      prepare_row(k_, c_.type, token(c_.key, b, t, h), new_row(new_keys_, b, h, t));
      float* value = new_row(new_values_, b, h, t);
      prepare_row(v_, c_.type, token(c_.value, b, t, h), value);
      finite &= all_finite(value, dim_);
    }
    any_value_[i] = !finite;
  }

  // Tiles, then rows in full precision, that tokens from `first` on can see.
  void list_runs(int64_t b, int64_t h, int64_t first, int64_t count, std::vector<Run>* tiles,
                 std::vector<Run>* rows) const;
  void add_rows(std::vector<Run>* runs, const void* keys, const void* values, int64_t position, int64_t count,
                int type) const;
  void list_items(int64_t first, int64_t count);
  void pass(int64_t first, int64_t count);
  void merge_row(int64_t b, int64_t head, int64_t t, int64_t first, int64_t count) const;

  const SkvAttention& c_;
  const SkvLayout& k_;
  const SkvLayout& v_;
  const SkvThreads* threads_;
  const TileShape key_shape_, value_shape_;
  const int64_t dim_, groups_;
  const float scale_;
  const Floats new_keys_, new_values_;  // [B][N_kv][S][D], in the cache's basis
  std::vector<Sequence> sequences_;
  std::vector<char> any_value_;  // [B][N_kv], whether its new values are not all finite

  // Of the pass.
  std::vector<Run> runs_;
  std::vector<Item> items_;
  std::vector<int64_t> first_item_;  // of each sequence and KV head, and one past the end
  int64_t partial_floats_ = 0;
  std::unique_ptr<Floats> queries_;       // [B][N_kv][token][group][D]
  std::unique_ptr<Floats> tile_queries_;  // the same in the basis of the tiles, where they have one
  std::unique_ptr<Floats> partials_;
};

void Attention::add_rows(std::vector<Run>* runs, const void* keys, const void* values, int64_t position, int64_t count,
                         int type) const {
  for (int64_t done = 0; done < count; done += kMaxRunTokens) {
    const int64_t some = std::min<int64_t>(kMaxRunTokens, count - done);
    runs->push_back({element(keys, type, done * dim_), element(values, type, done * dim_), position + done,
                     static_cast<int32_t>(some), type, type});
  }
}

void Attention::list_runs(int64_t b, int64_t h, int64_t first, int64_t count, std::vector<Run>* tiles,
                          std::vector<Run>* rows) const {
  const Sequence& s = sequences_[b];
  const int64_t sinks = k_.num_sink_tokens, t = k_.tile_tokens, from = seen_from(s.past + first);
  const uint8_t* key = block_of(c_.key_cache, c_.kv_num_heads, b, h);
  const uint8_t* value = block_of(c_.value_cache, c_.kv_num_heads, b, h);
  const int64_t key_slots = tiles_in(k_, c_.key_cache.block_bytes),
                value_slots = tiles_in(v_, c_.value_cache.block_bytes);
  const int64_t last_tile = s.tiled / t;
  const int64_t held = std::max<int64_t>(0, last_tile - std::min(key_slots, value_slots));
  for (int64_t i = std::max(held, (from - sinks) / t); i < last_tile; i++) {
    tiles->push_back({key + i % key_slots * key_shape_.tile_bytes, value + i % value_slots * value_shape_.tile_bytes,
                      sinks + i * t, static_cast<int32_t>(t), k_.bits == 16 ? k_.recent_type : kCodes,
                      v_.bits == 16 ? v_.recent_type : kCodes});
  }
  const uint8_t* key_rows = key + c_.key_cache.block_bytes - full_bytes(k_);
  const uint8_t* value_rows = value + c_.value_cache.block_bytes - full_bytes(v_);
  const auto add_cached = [&](int64_t position, int64_t end) {
    const int64_t row = full_row(k_, position);
    add_rows(rows, key_rows + row * row_bytes(k_), value_rows + row * row_bytes(v_), position, end - position,
             k_.recent_type);
  };
  if (from < std::min(sinks, s.past)) add_cached(from, std::min(sinks, s.past));
  int64_t position = std::max(sinks + s.tiled, from);
  while (position < s.past) {  // up to the ring's end, then from its start
    const int64_t left = ring_tokens(k_) - (position - sinks) % ring_tokens(k_),
                  end = std::min(s.past, position + left);
    add_cached(position, end);
    position = end;
  }
  const int64_t oldest = std::max<int64_t>(0, from - s.past);
  add_rows(rows, new_row(new_keys_, b, h, oldest), new_row(new_values_, b, h, oldest), s.past + oldest,
           std::min(first + count, s.added) - oldest, SKV_FLOAT);
}

void Attention::list_items(int64_t first, int64_t count) {
  runs_.clear();
  items_.clear();
  first_item_.assign(1, 0);
  partial_floats_ = 0;
  std::vector<Run> tiles, rows;
  for (int64_t b = 0; b < c_.batch; b++) {
    const int64_t tokens = std::clamp<int64_t>(sequences_[b].added - first, 0, count), query_rows = tokens * groups_;
    const int64_t blocks = (query_rows + kMaxQueryRows - 1) / kMaxQueryRows;
    for (int64_t h = 0; h < c_.kv_num_heads; h++) {
      tiles.clear();
      rows.clear();
      if (tokens > 0) list_runs(b, h, first, tokens, &tiles, &rows);
      const auto add = [&](const std::vector<Run>& runs, int64_t most, bool are_tiles) {
        for (size_t start = 0; start < runs.size(); start += most) {
          const int64_t length = std::min<int64_t>(most, runs.size() - start), first_run = runs_.size();
          runs_.insert(runs_.end(), runs.begin() + start, runs.begin() + start + length);
          for (int64_t i = 0; i < blocks; i++) {
            const int64_t row = query_rows * i / blocks, end = query_rows * (i + 1) / blocks;
            items_.push_back({b, h, row, end - row, first_run, length, partial_floats_, are_tiles});
            partial_floats_ += (end - row) * (dim_ + 2);
          }
        }
      };
      const int64_t aim = static_cast<int64_t>(tiles.size()) * c_.kv_num_heads / kItemsPerHeads;
      add(tiles, std::clamp(aim, kMinChunkTiles, kChunkTiles), true);
      add(rows, kChunkTiles, false);
      first_item_.push_back(items_.size());
    }
  }
}

void Attention::pass(int64_t first, int64_t count) {
  list_items(first, count);
  const int64_t heads = int64_t{c_.batch} * c_.kv_num_heads;
  queries_ = std::make_unique<Floats>(heads * count * groups_ * dim_);
  const bool turned =
      c_.key_cache.basis.key && std::any_of(items_.begin(), items_.end(), [](const Item& item) { return item.tiles; });
  if (turned) tile_queries_ = std::make_unique<Floats>(heads * count * groups_ * dim_);
  partials_ = std::make_unique<Floats>(partial_floats_);
  const bool large = count * c_.batch * c_.num_heads * dim_ > 32768;
  parallel_for(threads_, heads, large, [&](int64_t i) {
    const int64_t b = i / c_.kv_num_heads, h = i % c_.kv_num_heads;
    const int64_t tokens = std::clamp<int64_t>(sequences_[b].added - first, 0, count);
    for (int64_t r = 0; r < tokens * groups_; r++) {
      float* row = queries_->get() + (i * count * groups_ + r) * dim_;
      prepare_row(k_, c_.type, token(c_.query, b, first + r / groups_, h * groups_ + r % groups_), row);
      for (int64_t d = 0; d < dim_; d++) row[d] *= scale_;
    }
    if (!turned) return;
    const int64_t first_row = i * count * groups_ * dim_;
    unit().turn_queries(of_head(c_.key_cache.basis.query, k_, h), static_cast<int32_t>(dim_),
                        queries_->get() + first_row, tokens * groups_, tile_queries_->get() + first_row);
  });
  parallel_for(threads_, items_.size(), true, [&](int64_t i) {
    const Item& item = items_[i];
    const int64_t head = item.b * c_.kv_num_heads + item.h;
    int64_t from[kMaxQueryRows], last[kMaxQueryRows];
    for (int64_t r = 0; r < item.rows; r++) {
      last[r] = sequences_[item.b].past + first + (item.first_row + r) / groups_;
      from[r] = seen_from(last[r]);
    }
    const AttendJob job = {
        &key_shape_,
        &value_shape_,
        runs_.data() + item.first_run,
        static_cast<int32_t>(item.runs),
        static_cast<int32_t>(item.rows),
        (item.tiles && turned ? tile_queries_ : queries_)->get() + (head * count * groups_ + item.first_row) * dim_,
        from,
        last,
        c_.softcap,
        any_value_[head] != 0,
        partials_->get() + item.partial};
    unit().attend(&job);
  });
  parallel_for(threads_, heads, large, [&](int64_t i) {
    const int64_t b = i / c_.kv_num_heads, h = i % c_.kv_num_heads;
    for (int64_t t = 0; t < count; t++) {
      for (int64_t g = 0; g < groups_; g++) merge_row(b, h * groups_ + g, t, first, count);
    }
  });
}

// One row of the output from the partials of its items.
void Attention::merge_row(int64_t b, int64_t head, int64_t t, int64_t first, int64_t count) const {
  float sums[kMaxDim];
  memset(sums, 0, sizeof(float) * dim_);
  const int64_t h = head / groups_, kv_head = b * c_.kv_num_heads + h, row = t * groups_ + head % groups_;
  void* out =
      const_cast<void*>(element(c_.output, c_.type, ((b * c_.tokens + first + t) * c_.num_heads + head) * k_.head_dim));
  if (first + t >= sequences_[b].added) {
    unit().store_row(c_.type, sums, out, k_.head_dim);
    return;
  }
  float sink = -INFINITY;
  if (c_.head_sink) unit().load_row(c_.type, element(c_.head_sink, c_.type, head), &sink, 1);
  float peak = sink, total = 0;
  const auto each = [&](auto&& body) {
    for (int64_t i = first_item_[kv_head]; i < first_item_[kv_head + 1]; i++) {
      const Item& item = items_[i];
      if (row < item.first_row || row >= item.first_row + item.rows) continue;
      body(partials_->get() + item.partial + (row - item.first_row) * (dim_ + 2));
    }
  };
  each([&](const float* partial) { peak = std::max(peak, partial[0]); });
  each([&](const float* partial) {
    if (partial[0] == -INFINITY && !isnan(partial[1])) return;  // it saw nothing
    const float weight = expf(partial[0] - peak);
    total += weight * partial[1];
    for (int64_t d = 0; d < dim_; d++) sums[d] += weight * partial[2 + d];
  });
  if (c_.head_sink) total += expf(sink - peak);
  // A query that is not finite has no meaningful softmax: not a number, as in plain attention.
  const float* query = queries_->get() + (kv_head * count * groups_ + row) * dim_;
  const float norm = all_finite(query, dim_) ? 1 / total : NAN;
  for (int64_t d = 0; d < dim_; d++) sums[d] *= norm;
  if (v_.rotation == SKV_HADAMARD) unit().rotate(sums, static_cast<int32_t>(dim_), rotation_dim(v_));
  unit().store_row(c_.type, sums, out, k_.head_dim);
}

}  // namespace
}  // namespace skv

extern "C" int skv_attend(const SkvAttention* call, const SkvThreads* threads) {
  using namespace skv;
  if (call == nullptr) return fail(SKV_INVALID_ARGUMENT, "skv_attend: call; got null; expected a pointer");
  if (int status = check_call(*call, false)) return status;
  try {
    Attention(*call, threads).run();
    return SKV_OK;
  } catch (const std::bad_alloc&) {
    return fail(SKV_RUNTIME_ERROR, "skv_attend: out of memory");
  }
}

extern "C" int skv_attention(const SkvAttention* call, const SkvThreads* threads) {
  using namespace skv;
  if (int status = skv_attend(call, threads)) return status;
  try {
    return append_call(*call, threads);
  } catch (const std::bad_alloc&) {
    return fail(SKV_RUNTIME_ERROR, "skv_attention: out of memory");
  }
}
