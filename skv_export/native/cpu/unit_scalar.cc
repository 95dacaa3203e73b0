// The portable unit: every case, in float32, without intrinsics. The fallback for old processors, and the simplest form
// of what the other units compute.
#include <math.h>

#include "cpu/isa.h"
#include "cpu/tile_codec.h"

namespace {

using skv::AttendJob;
using skv::Run;

// Tokens [first, first + count) of a run's keys or values as rows [count][D]; first is a multiple of kStrip.
void load_tokens(const TileShape& shape, const void* data, int form, int first, int count, float* rows) {
  if (form == skv::kCodes) {
    decode_strip(shape, static_cast<const uint8_t*>(data), first, rows);
    return;
  }
  const int64_t start = static_cast<int64_t>(first) * shape.dim * skv::type_bytes(form);
  load_row(form, static_cast<const uint8_t*>(data) + start, rows, count * shape.dim);
}

// Online softmax: folds tokens [count] at `position` into a row's partial {peak, total, values [D]}.
void fold(const AttendJob& job, int row, int64_t position, int count, const float* keys, const float* values) {
  const int dim = job.key_shape->dim;
  const float* query = job.queries + static_cast<int64_t>(row) * dim;
  float* partial = job.partials + static_cast<int64_t>(row) * (dim + 2);
  float* sums = partial + 2;
  for (int t = 0; t < count; t++) {
    if (position + t < job.first[row] || position + t > job.last[row]) continue;
    const float *key = keys + static_cast<int64_t>(t) * dim, *value = values + static_cast<int64_t>(t) * dim;
    float score = 0;
    for (int d = 0; d < dim; d++) score += query[d] * key[d];
    if (job.softcap > 0) score = job.softcap * tanhf(score / job.softcap);
    if (score > partial[0]) {
      const float shrink = expf(partial[0] - score);
      partial[0] = score;
      partial[1] *= shrink;
      for (int d = 0; d < dim; d++) sums[d] *= shrink;
    }
    const float weight = expf(score - partial[0]);
    partial[1] += weight;
    for (int d = 0; d < dim; d++) sums[d] += weight * value[d];
  }
}

void attend(const AttendJob* job) {
  const int dim = job->key_shape->dim;
  float keys[skv::kMaxDim * kStrip], values[skv::kMaxDim * kStrip];
  for (int row = 0; row < job->rows; row++) {
    float* partial = job->partials + static_cast<int64_t>(row) * (dim + 2);
    memset(partial, 0, sizeof(float) * (dim + 2));
    partial[0] = -INFINITY;
  }
  for (int r = 0; r < job->num_runs; r++) {
    const Run& run = job->runs[r];
    for (int first = 0; first < run.count; first += kStrip) {
      const int count = run.count - first < kStrip ? run.count - first : kStrip;
      load_tokens(*job->key_shape, run.key, run.key_form, first, count, keys);
      load_tokens(*job->value_shape, run.value, run.value_form, first, count, values);
      for (int row = 0; row < job->rows; row++) fold(*job, row, run.position + first, count, keys, values);
    }
  }
}

}  // namespace

namespace skv {
const Unit kUnitScalar = {"scalar", attend, encode_tile, decode_tile, multiply, multiply, rotate, load_row, store_row};
}  // namespace skv
