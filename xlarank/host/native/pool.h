// Look up and pool, compiled once for each instruction set and chosen at run time. Sums are taken in the
// order of the ids in float32, so every instruction set gives the same bits.
#pragma once

#include <cstdint>

namespace xlarank {

// Bags of row numbers, back to back: bag i is rows[bounds[i], bounds[i + 1]).
struct Bags {
  const int32_t* rows;    // each a row of the table, or -1 for a row of zeros
  const int64_t* bounds;  // [num_bags + 1], from 0
  int64_t num_bags;
};

enum class Divide { kNo, kByCount, kBySqrtCount };

// Writes the pooled vector [dim] of each bag to out, `stride` floats from bag to bag. Prefetches `ahead`
// rows in front of the one being added, across bags.
using PoolFunction = void (*)(const float* table, int64_t dim, Bags bags, Divide divide, int64_t ahead, float* out,
                              int64_t stride);

void pool_baseline(const float*, int64_t, Bags, Divide, int64_t, float*, int64_t);
#if defined(__x86_64__)
void pool_avx2(const float*, int64_t, Bags, Divide, int64_t, float*, int64_t);
void pool_avx512(const float*, int64_t, Bags, Divide, int64_t, float*, int64_t);
#endif

// The function for "avx512", "avx2", "baseline" or "auto" (the best that this CPU runs); null if it can't.
PoolFunction pool_function(const char* isa);

}  // namespace xlarank
