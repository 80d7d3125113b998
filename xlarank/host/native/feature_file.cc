#include "feature_file.h"

#include "hashing.h"

namespace xlarank {

std::string FeatureFile::fault(const RecordLayout& layout) {
  if (num_slots_ == 0 || (num_slots_ & (num_slots_ - 1)) != 0) return "the index isn't a power of two of slots";
  size_t num_rows = 0;
  for (size_t i = 0; i < num_slots_; ++i) {
    const FileSlot& slot = slots_[i];
    if (slot.place == 0) continue;
    ++num_rows;
    const uint64_t begin = slot.place - 1;
    const std::string where = "the record of id " + std::to_string(slot.id);
    if (begin % kRecordAlignment != 0 || num_bytes_ < sizeof(Record) || begin > num_bytes_ - sizeof(Record)) {
      return where + " begins at byte " + std::to_string(begin) + " of " + std::to_string(num_bytes_);
    }
    const auto* const record = reinterpret_cast<const Record*>(records_ + begin);
    if (record->id != slot.id) return where + " says that it is of id " + std::to_string(record->id);
    if (record->size > num_bytes_ - sizeof(Record) - begin || !layout.is_whole(payload(record), record->size)) {
      return where + " isn't whole";
    }
  }
  if (2 * num_rows > num_slots_) return "the index is more than half full";
  num_rows_ = num_rows;
  return "";
}

const Record* FeatureFile::find(int64_t id, uint64_t hash) const {
  if (num_rows_ == 0) return nullptr;
  const size_t mask = num_slots_ - 1;
  for (size_t at = hash & mask; slots_[at].place != 0; at = (at + 1) & mask) {
    if (slots_[at].id == id) return reinterpret_cast<const Record*>(records_ + (slots_[at].place - 1));
  }
  return nullptr;
}

std::vector<FileSlot> build_index(const int64_t* ids, const int64_t* places, size_t num_rows, int64_t (&twice)[2]) {
  size_t num_slots = 16;
  while (num_slots < 2 * num_rows) num_slots *= 2;
  std::vector<FileSlot> slots(num_slots, FileSlot{0, 0});
  const size_t mask = num_slots - 1;
  for (size_t row = 0; row < num_rows; ++row) {
    const int64_t id = load<int64_t>(ids + row);
    size_t at = hash_int64(id, 0) & mask;
    for (; slots[at].place != 0; at = (at + 1) & mask) {
      if (slots[at].id != id) continue;
      // Rows are put in in order: the row of the earlier one is where its place is found.
      size_t first = 0;
      while (load<int64_t>(ids + first) != id) ++first;
      twice[0] = static_cast<int64_t>(first);
      twice[1] = static_cast<int64_t>(row);
      return {};
    }
    slots[at] = FileSlot{id, 1 + static_cast<uint64_t>(load<int64_t>(places + row))};
  }
  return slots;
}

}  // namespace xlarank
