// The AVX2 with VNNI unit: compiled for that instruction set, chosen by dispatch.cc where the processor has it.
#include "cpu/simd_avx2.h"

#include "cpu/attend_simd.h"

namespace skv {
const Unit kUnitAvxVnni = {"avxvnni",    attend, encode_tile, decode_tile, multiply,
                           turn_queries, rotate, load_row,    store_row};
}  // namespace skv
