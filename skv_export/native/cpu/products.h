// Products of rows with a matrix, which calibrated keys take into their basis; each sum in the reference's order.
//
// Included by tile_codec.h into each unit and compiled with its instruction set: everything is in an unnamed namespace.
#pragma once
#include <stdint.h>
#include <string.h>

#include "kv_layout.h"

namespace {

// Numbers that fit a register, and how many rows of a product, two registers each, fit the registers.
#if defined(__AVX512F__)
typedef float Lanes __attribute__((vector_size(64)));
constexpr int kProductRows = 8;
#elif defined(__AVX__)
typedef float Lanes __attribute__((vector_size(32)));
constexpr int kProductRows = 4;
#else
typedef float Lanes __attribute__((vector_size(16)));
constexpr int kProductRows = 4;
#endif
constexpr int kRegister = sizeof(Lanes) / sizeof(float), kPanel = 2 * kRegister;  // numbers of one and of two

Lanes load_lanes(const float* x) {
  Lanes lanes;
  memcpy(&lanes, x, sizeof(lanes));
  return lanes;
}

void store_lanes(float* to, Lanes x) { memcpy(to, &x, sizeof(x)); }

// kRows rows [kRows][n] times kPanel columns [n][kPanel] of a matrix.
template <int kRows>
void multiply_panel(const float* columns, int n, const float* rows, float* products) {
  Lanes sums[kRows][2] = {};
  for (int j = 0; j < n; j++) {
    const Lanes left = load_lanes(columns + j * kPanel), right = load_lanes(columns + j * kPanel + kRegister);
    for (int r = 0; r < kRows; r++) {
      sums[r][0] += left * rows[r * n + j];
      sums[r][1] += right * rows[r * n + j];
    }
  }
  for (int r = 0; r < kRows; r++) {
    store_lanes(products + r * n, sums[r][0]);
    store_lanes(products + r * n + kRegister, sums[r][1]);
  }
}

// Rows [count][n] times a matrix [n][n], n a multiple of 32; each sum in the order of the row's numbers (reference:
// _products). Columns are copied once for all rows: in the matrix they are a power of two apart, and evict each other.
void multiply(const float* matrix, int32_t n, const float* rows, int64_t count, float* products) {
  alignas(64) float columns[skv::kMaxDim * kPanel];
  for (int i = 0; i < n; i += kPanel) {
    for (int j = 0; j < n; j++) memcpy(columns + j * kPanel, matrix + int64_t{j} * n + i, sizeof(float) * kPanel);
    int64_t r = 0;
    for (; r + kProductRows <= count; r += kProductRows) {
      multiply_panel<kProductRows>(columns, n, rows + r * n, products + r * n + i);
    }
    for (; r < count; r++) multiply_panel<1>(columns, n, rows + r * n, products + r * n + i);
  }
}

}  // namespace
