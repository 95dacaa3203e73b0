// The AVX-512 VNNI unit: compiled for that instruction set, chosen by dispatch.cc where the processor has it.
#include "cpu/simd_avx512.h"

#include "cpu/attend_simd.h"

namespace skv {
const Unit kUnitAvx512 = {"avx512vnni", attend, encode_tile, decode_tile, multiply,
                          turn_queries, rotate, load_row,    store_row};
}  // namespace skv
