// The interface between the portable code (attention.cc, cache.cc) and the units, one translation unit per instruction
// set: plain structs and a table of functions. Nothing here has code: an inline function that a unit shared with the
// rest could be kept by the linker in its AVX-512 form.
#pragma once
#include <stdint.h>

namespace skv {

// Most query rows that one call of Unit::attend takes, most tokens of a run, most channels, and the smallest group.
enum { kMaxQueryRows = 4, kMaxRunTokens = 128, kMaxDim = 1024, kMinGroup = 32 };

// A tile of one cache tensor, spelled out so that units need not compute it.
struct TileShape {
  int32_t dim;  // D, padded
  int32_t rotation_dim;
  int32_t bits;
  int32_t group_size;   // channels that share a scale; D with one scale per channel
  int32_t tile_tokens;  // T
  int32_t row_type;     // SkvType of full-precision rows
  bool channel;         // scale and offset per channel; else a scale per token and group
  bool byte_channels;   // these in 8 bits
  bool is_value;
  int32_t num_planes;
  struct Plane {
    int32_t width;  // bits
    int32_t shift;  // of these bits in the code
    int64_t offset;
  } planes[2];
  int64_t parameters;  // offset in the tile
  int64_t means;       // offset in the tile of a mean per channel; 0 = none
  int64_t tile_bytes;
};

// How the keys or values of a run are stored.
enum Form { kCodes = -1 };  // a tile; else an SkvType: rows [count][D] of it

// Consecutive tokens: one tile, or full-precision rows.
struct Run {
  const void* key;
  const void* value;
  int64_t position;  // of the first token
  int32_t count;
  int32_t key_form;
  int32_t value_form;
};

// Up to kMaxQueryRows query rows of one KV head against some runs. All keys of the runs have one form, all values too.
struct AttendJob {
  const TileShape* key_shape;
  const TileShape* value_shape;
  const Run* runs;
  int32_t num_runs;
  int32_t rows;
  const float* queries;  // [rows][D], in the runs' basis, scaled, finite
  const int64_t* first;  // [rows], first position that the row sees
  const int64_t* last;   // [rows], last position that the row sees
  float softcap;         // 0 = none
  bool any_value;        // values of float rows need not be finite
  // Out, [rows] of {peak, total, weighted values [D]}: sums of exp(score - peak) and of exp(score - peak) * value.
  // A row that sees nothing has peak = -infinity, total = 0 (or close to it) and values 0. A score that is not a number
  // makes the total one too.
  float* partials;
};

struct Unit {
  const char* name;
  void (*attend)(const AttendJob* job);
  // One tile's bytes from content [T][D], finite, of row_type's precision; of calibrated keys in the tile's basis, with
  // the head's feedback [D][D].
  void (*encode_tile)(const TileShape* shape, const float* feedback, const float* content, uint8_t* tile);
  // Content [T][D] from one tile's bytes.
  void (*decode_tile)(const TileShape* shape, const uint8_t* tile, float* content);
  // Rows [count][n] times a matrix [n][n], each product and sum rounded, in the order of the row; n is a multiple
  // of 32.
  void (*multiply)(const float* matrix, int32_t n, const float* rows, int64_t count, float* products);
  // The same for few rows, rounded as is fastest.
  void (*turn_queries)(const float* matrix, int32_t n, const float* rows, int64_t count, float* turned);
  // Normalized Walsh-Hadamard transform of each block of a row [n], in place.
  void (*rotate)(float* row, int32_t n, int32_t block);
  // n numbers of an SkvType to float, and back: to nearest even, float16 saturates.
  void (*load_row)(int32_t type, const void* source, float* row, int32_t n);
  void (*store_row)(int32_t type, const float* row, void* target, int32_t n);
};

extern const Unit kUnitScalar;
extern const Unit kUnitAvx2;
extern const Unit kUnitAvxVnni;
extern const Unit kUnitAvx512;
extern const Unit kUnitNeon;

// The unit that this process uses (dispatch.cc).
const Unit& unit();

}  // namespace skv
