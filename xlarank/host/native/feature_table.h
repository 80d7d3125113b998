// Candidate ids to records: those put in while serving, and behind them those of a file. One writer at a time,
// readers without a lock.
//
// A record in memory is never changed: an update links another in its place, and the old one is freed when nobody
// can be reading it (grace.h). So a reader sees a whole record, the old or the new.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "feature_file.h"
#include "grace.h"
#include "records.h"

namespace xlarank {

struct FeatureStats {
  int64_t rows = 0;       // in memory and in the file
  int64_t cached = 0;     // in memory
  int64_t bytes = 0;      // of memory, not yet freed ones included; never above the limit
  int64_t hits = 0, misses = 0, evictions = 0;
  int64_t version = 0;    // calls of put and remove
  int64_t oldest = -1;    // time of the oldest record in memory, to within calls of put that overlap; -1 for none
};

struct FeatureLookup {
  Columns columns;                  // of the rows that were found, in their order
  std::vector<int64_t> missing;     // positions of the others
};

class FeatureTable {
 public:
  // `limit`: bytes of memory, 0 for none; the least wanted record makes room for a new one (SIEVE). A record that
  // doesn't fit at all isn't kept. A file and a limit don't go together: a record that hides the file's must stay.
  FeatureTable(const RecordLayout& layout, size_t limit, FeatureFile file);
  FeatureTable(const FeatureTable&) = delete;
  ~FeatureTable();

  // A record in memory whose time is before `oldest` is not found. Columns of more bytes than `max_bytes` are
  // counted and not made.
  FeatureLookup lookup(const int64_t* ids, size_t num_ids, const std::vector<bool>& wanted, uint32_t oldest,
                       size_t max_bytes);

  // Puts rows in, over those that there are. With `stamps`, of `stamps()` before the rows were read from
  // elsewhere, only those that are not there, or are older than `oldest`, and were not written to since. `time`
  // counts in any unit; it is that of the rows.
  void put(const int64_t* ids, size_t num_ids, const std::vector<Column>& columns, const uint64_t* stamps,
           uint32_t time, uint32_t oldest);

  // Returns how many there were.
  int64_t remove(const int64_t* ids, size_t num_ids, uint32_t time);

  std::vector<uint64_t> stamps(const int64_t* ids, size_t num_ids);
  FeatureStats stats();

 private:
  struct Node;
  struct Slots;

  Node* make_node(int64_t id, size_t payload_bytes, uint32_t time);
  void link(Node* node, uint64_t hash);
  void unlink(size_t at);
  void replace(size_t at, Node* old, Node* node, uint64_t hash);
  void make_room(size_t bytes);
  void rebuild(size_t capacity);
  void evict();
  void retire(Node* node);
  void append(Node* node);
  void detach(Node* node);
  size_t used_bytes() const;

  const RecordLayout layout_;
  const size_t limit_;
  const size_t most_;  // of the limit, for what is linked
  const FeatureFile file_;
  std::atomic<Slots*> slots_;  // readers load it; changed under write_
  std::atomic<int64_t> hits_{0}, misses_{0};
  Grace grace_;  // writers' part under write_

  std::mutex write_;
  // All below guarded by write_.
  size_t live_ = 0;  // nodes linked
  size_t used_ = 0;  // slots that a search doesn't end at: live ones and those that a removal has left
  size_t node_bytes_ = 0;
  size_t slot_bytes_ = 0;
  int64_t rows_;
  int64_t evictions_ = 0;
  uint64_t version_ = 0;
  Node* newest_ = nullptr;  // in order of arrival
  Node* oldest_ = nullptr;
  Node* hand_ = nullptr;  // where the search for the next to evict goes on; null: at the oldest
  std::vector<uint64_t> written_;  // version of the last write to an id of each stripe of hashes
};

}  // namespace xlarank
