// Records in a file, mapped: an open-addressing index of 16 bytes a slot, and the records that it points at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "records.h"

namespace xlarank {

struct FileSlot {
  int64_t id;
  uint64_t place;  // 1 + where the record begins; 0 = empty
};

// Records begin at multiples of this.
constexpr size_t kRecordAlignment = 8;

class FeatureFile {
 public:
  FeatureFile() = default;
  FeatureFile(const FileSlot* slots, size_t num_slots, const uint8_t* records, size_t num_bytes)
      : slots_(slots), num_slots_(num_slots), records_(records), num_bytes_(num_bytes) {}

  // What is wrong with it, empty if nothing: no lookup of a file that was found good leaves its memory.
  std::string fault(const RecordLayout& layout);

  bool empty() const { return num_rows_ == 0; }
  size_t num_rows() const { return num_rows_; }

  // nullptr if there is none.
  const Record* find(int64_t id, uint64_t hash) const;
  void prefetch(uint64_t hash) const { __builtin_prefetch(slots_ + (hash & (num_slots_ - 1))); }

 private:
  const FileSlot* slots_ = nullptr;
  size_t num_slots_ = 0;  // a power of two, at most half full
  const uint8_t* records_ = nullptr;
  size_t num_bytes_ = 0;
  size_t num_rows_ = 0;  // set by `fault`; until then nothing is found
};

// The index of records by id; `places` are where they begin. If an id comes twice, `twice` gets its two rows and
// the index is empty.
std::vector<FileSlot> build_index(const int64_t* ids, const int64_t* places, size_t num_rows, int64_t (&twice)[2]);

}  // namespace xlarank
