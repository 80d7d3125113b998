// Look up and pool, and round, compiled once for each instruction set and chosen at run time. Sums are taken
// in the order of the ids in float32, so every instruction set gives the same bits.
#pragma once

#include <cstdint>

namespace xlarank {

// Bags of row numbers, back to back: bag i is rows[bounds[i], bounds[i + 1]). They may be a block of more:
// the next block begins where this one ends.
struct Bags {
  const int32_t* rows;    // each a row of the table, or -1 for a row of zeros
  const int64_t* bounds;  // [num_bags + 1], from 0 in the first block
  int64_t num_bags;
  int64_t num_rows;  // of all blocks
};

enum class Divide { kNo, kByCount, kBySqrtCount };

// Writes the pooled vector [dim] of each bag to out, `stride` floats from bag to bag. Prefetches `ahead`
// rows in front of the one being added, across bags and blocks.
using PoolFunction = void (*)(const float* table, int64_t dim, Bags bags, Divide divide, int64_t ahead, float* out,
                              int64_t stride);

// Rounds `num_rows` rows of `width` floats, back to back, to bfloat16, `stride` items from row to row: to the
// nearest, ties to even, beyond the largest to infinity; a NaN to the quiet NaN of its sign, as ml_dtypes.
using RoundFunction = void (*)(const float* values, int64_t num_rows, int64_t width, uint16_t* out, int64_t stride);

// What one instruction set has.
struct IsaFunctions {
  PoolFunction pool;
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
