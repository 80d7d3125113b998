// Repeated bags of a task are pooled once: finds them, and says when looking for them is worth its cost.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace xlarank {

// Bags that equal an earlier one, id by id. Reused by every task of a thread.
class Repeats {
 public:
  // Keeps the first of equal bags: `rows` and `bounds` (bag i is rows[bounds[i], bounds[i + 1])) are cut down to
  // the bags that are left, in order. Returns their number.
  int64_t compact(std::vector<int32_t>& rows, std::vector<int64_t>& bounds);

  // Position of each bag's equal among those that are left; never greater than its own.
  const std::vector<int32_t>& kept() const { return kept_; }

 private:
  std::vector<int32_t> kept_;
  std::vector<int32_t> slots_;  // open addressing: a position among those left, or -1
};

// Whether tasks of a feature look for repeats. Any thread may call; what it answers never changes a result.
class RepeatWatch {
 public:
  explicit RepeatWatch(size_t num_features) : pauses_(num_features) {}

  bool looks(size_t feature, int64_t num_ids, int64_t num_bags);
  void saw(size_t feature, int64_t num_ids, int64_t num_repeated_ids);

 private:
  std::vector<std::atomic<int32_t>> pauses_;  // tasks that won't look; races lose a look, no more
};

}  // namespace xlarank
