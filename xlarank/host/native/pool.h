// Look up and pool, and round, compiled once for each instruction set and chosen at run time. A row becomes
// float32 first and sums are taken in the order of the ids, so every instruction set gives the same bits.
#pragma once

#include <cstdint>

#include "lines.h"

namespace xlarank {

// How a row of a table is encoded; xlarank/host/row_codec.py says the same in NumPy. int8 and int4 rows begin
// with scale and bias, float32 each, and hold unsigned q, value = q * scale + bias, rounded twice.
enum class RowFormat { kFloat32, kFloat16, kBfloat16, kInt8, kInt4 };

// Bytes that the values of a row take, scale and bias among them.
constexpr int64_t encoded_bytes(RowFormat format, int64_t dim) {
  switch (format) {
    case RowFormat::kFloat32:
      return 4 * dim;
    case RowFormat::kFloat16:
    case RowFormat::kBfloat16:
      return 2 * dim;
    case RowFormat::kInt8:
      return 8 + dim;
    case RowFormat::kInt4:
      return 8 + (dim + 1) / 2;
  }
  return 0;
}

// Rows of a table in memory, and how far in front of the row being read to prefetch.
struct TableView {
  const uint8_t* data;
  RowFormat format;
  int64_t row_bytes;  // from row to row; >= encoded_bytes(format, dim)
  int64_t dim;
  int64_t ahead;  // rows; 0 = no prefetch
  const uint32_t* stamps = nullptr;  // [kNumStamps] of stamps.h; null: rows never change
};

// Rows that `lines` cache lines make, at least one unless lines is 0: distances are in lines, so that wide
// rows don't overrun a core's miss buffers.
constexpr int64_t rows_ahead(int64_t lines, int64_t row_bytes) {
  const int64_t lines_a_row = (row_bytes + kLineBytes - 1) / kLineBytes;
  return lines == 0 ? 0 : lines < lines_a_row ? 1 : lines / lines_a_row;
}

// Bags of row numbers, back to back: bag i is rows[bounds[i], bounds[i + 1]). They may be a block of more:
// the next block begins where this one ends.
struct Bags {
  const int32_t* rows;    // each a row of the table, or -1 for a row of zeros
  const int64_t* bounds;  // [num_bags + 1], from 0 in the first block
  int64_t num_bags;
  int64_t num_rows;  // of all blocks
};

enum class Divide { kNo, kByCount, kBySqrtCount };

// Writes the pooled vector [dim] of each bag to out, `stride` floats from bag to bag. The prefetch cursor runs
// across bags and blocks.
using PoolFunction = void (*)(const TableView& table, const Bags& bags, Divide divide, float* out, int64_t stride);

// Writes rows[begin, end) of the table to out, `stride` floats from row to row. rows[0, num_rows) are all that
// will be read, in order: the prefetch cursor runs over them.
using CopyFunction = void (*)(const TableView& table, const int32_t* rows, int64_t num_rows, int64_t begin,
                              int64_t end, float* out, int64_t stride);

// Rounds `num_rows` rows of `width` floats, back to back, to bfloat16, `stride` items from row to row: to the
// nearest, ties to even, beyond the largest to infinity; a NaN to the quiet NaN of its sign, as ml_dtypes.
using RoundFunction = void (*)(const float* values, int64_t num_rows, int64_t width, uint16_t* out, int64_t stride);

// What one instruction set has.
struct IsaFunctions {
  PoolFunction pool;
  CopyFunction copy;
  RoundFunction round;
};

extern const IsaFunctions kBaseline;
#if defined(__x86_64__)
extern const IsaFunctions kAvx2;
extern const IsaFunctions kAvx512;
#endif

// The functions for "avx512", "avx2", "baseline" or "auto" (the best that this CPU runs); null if it can't.
const IsaFunctions* isa_functions(const char* isa);

}  // namespace xlarank
