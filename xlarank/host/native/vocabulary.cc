#include "vocabulary.h"

#include <cstring>
#include <stdexcept>

#include "hashing.h"

namespace xlarank {
namespace {

// Probes of one block are in flight together: slots of a large vocabulary are not in cache.
constexpr size_t kBlock = 16;

size_t capacity_for(size_t num_values) {
  if (num_values >= (size_t{1} << 31) - 1) throw std::invalid_argument("vocabulary: too many values");
  size_t capacity = 16;
  while (capacity < 2 * num_values) capacity *= 2;
  return capacity;
}

bool equal_bytes(const uint8_t* a, const uint8_t* b, int64_t size) {
  return size == 0 || std::memcmp(a, b, static_cast<size_t>(size)) == 0;
}

}  // namespace

IntVocabulary::IntVocabulary(const int64_t* values, size_t num_values)
    : slots_(capacity_for(num_values), Slot{0, 0}) {
  const size_t mask = slots_.size() - 1;
  for (size_t i = 0; i < num_values; ++i) {
    const int64_t value = load<int64_t>(values + i);
    size_t at = hash_int64(value, 0) & mask;
    while (slots_[at].row) at = (at + 1) & mask;
    slots_[at] = Slot{value, static_cast<int32_t>(i + 1)};
  }
}

void IntVocabulary::lookup(const int64_t* values, size_t num_values, int32_t* rows) const {
  const size_t mask = slots_.size() - 1;
  size_t at[kBlock];
  for (size_t begin = 0; begin < num_values; begin += kBlock) {
    const size_t count = num_values - begin < kBlock ? num_values - begin : kBlock;
    for (size_t i = 0; i < count; ++i) {
      at[i] = hash_int64(load<int64_t>(values + begin + i), 0) & mask;
      __builtin_prefetch(&slots_[at[i]]);
    }
    for (size_t i = 0; i < count; ++i) {
      const int64_t value = load<int64_t>(values + begin + i);
      size_t slot = at[i];
      while (slots_[slot].row && slots_[slot].value != value) slot = (slot + 1) & mask;
      rows[begin + i] = slots_[slot].row;
    }
  }
}

StringVocabulary::StringVocabulary(Strings strings, size_t num_strings)
    : offsets_(num_strings + 1), slots_(capacity_for(num_strings), Slot{0, 0}) {
  std::memcpy(offsets_.data(), strings.offsets, (num_strings + 1) * sizeof(int64_t));
  blob_.assign(strings.blob, strings.blob + offsets_.back());
  const size_t mask = slots_.size() - 1;
  for (size_t i = 0; i < num_strings; ++i) {
    const uint64_t hash = hash_bytes(blob_.data() + offsets_[i], offsets_[i + 1] - offsets_[i], 0);
    size_t at = hash & mask;
    while (slots_[at].row) at = (at + 1) & mask;
    slots_[at] = Slot{hash, static_cast<int32_t>(i + 1)};
  }
}

void StringVocabulary::lookup(Strings strings, size_t begin, size_t num_strings, int32_t* rows) const {
  const size_t mask = slots_.size() - 1;
  uint64_t hashes[kBlock];
  for (size_t base = 0; base < num_strings; base += kBlock) {
    const size_t count = num_strings - base < kBlock ? num_strings - base : kBlock;
    const int64_t* const offsets = strings.offsets + begin + base;
    for (size_t i = 0; i < count; ++i) {
      const int64_t from = load<int64_t>(offsets + i), to = load<int64_t>(offsets + i + 1);
      hashes[i] = hash_bytes(strings.blob + from, static_cast<size_t>(to - from), 0);
      __builtin_prefetch(&slots_[hashes[i] & mask]);
    }
    for (size_t i = 0; i < count; ++i) {
      const int64_t from = load<int64_t>(offsets + i), size = load<int64_t>(offsets + i + 1) - from;
      size_t slot = hashes[i] & mask;
      for (; slots_[slot].row; slot = (slot + 1) & mask) {
        const int64_t entry = slots_[slot].row - 1;
        if (slots_[slot].hash == hashes[i] && offsets_[entry + 1] - offsets_[entry] == size &&
            equal_bytes(blob_.data() + offsets_[entry], strings.blob + from, size)) {
          break;
        }
      }
      rows[base + i] = slots_[slot].row;
    }
  }
}

}  // namespace xlarank
