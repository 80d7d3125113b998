// Values to 1 + their position in a vocabulary, by open addressing; 0 for any other value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace xlarank {

// Strings back to back: string i is blob[offsets[i], offsets[i + 1]). Offsets may be unaligned.
struct Strings {
  const uint8_t* blob = nullptr;
  const int64_t* offsets = nullptr;
};

class IntVocabulary {
 public:
  // `values`: distinct, copied.
  IntVocabulary(const int64_t* values, size_t num_values);

  // rows[i] = row of values[i]. `values` may be unaligned.
  void lookup(const int64_t* values, size_t num_values, int32_t* rows) const;

 private:
  struct Slot {
    int64_t value;
    int32_t row;  // 0 = empty
  };
  std::vector<Slot> slots_;  // a power of two, at most half full
};

class StringVocabulary {
 public:
  // `strings`: distinct, copied.
  StringVocabulary(Strings strings, size_t num_strings);

  // rows[i] = row of string begin + i.
  void lookup(Strings strings, size_t begin, size_t num_strings, int32_t* rows) const;

 private:
  struct Slot {
    uint64_t hash;
    int32_t row;  // 0 = empty
  };
  std::vector<uint8_t> blob_;
  std::vector<int64_t> offsets_;
  std::vector<Slot> slots_;  // a power of two, at most half full
};

}  // namespace xlarank
