// Fills the buffers of a batch: preprocess, look up, pool and write every feature of every row in one pass.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"
#include "pool.h"
#include "repeats.h"
#include "thread_pool.h"

namespace xlarank {

// Candidates [begin, end) of a request, and its context. 0 <= begin < end <= num_candidates.
struct Segment {
  const Request* request;
  int64_t begin;
  int64_t end;
};

// Writes all of the leaves: leaves[i] holds num_requests or num_rows rows (by its scope) of
// plan.leaves[i].row_bytes. Context s and the candidates of segment s in order; then padding, which repeats
// the last valid row. Neither threads nor the split into segments nor `watch` change a bit. Everything is done in float32
// and, in a leaf of bfloat16, rounded at the end.
//
// Returns the first feature with an id out of range under policy error (it reads as zeros), or -1.
// Requires at least one segment, num_requests >= segments and num_rows >= their rows.
int64_t gather(const Plan& plan, const IsaFunctions& isa, ThreadPool& threads, RepeatWatch& watch,
               const std::vector<Segment>& segments, int64_t num_rows, int64_t num_requests,
               const std::vector<uint8_t*>& leaves);

}  // namespace xlarank
