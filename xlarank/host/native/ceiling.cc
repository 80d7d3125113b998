#include "ceiling.h"

#include <cstring>

namespace xlarank {

uint64_t read_rows(const TableView& table, const int32_t* rows, int64_t num_rows) {
  uint64_t folded = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (table.ahead && i + table.ahead < num_rows) {
      const uint8_t* const next = table.data + rows[i + table.ahead] * table.row_bytes;
      for (int64_t at = 0; at < table.row_bytes; at += kLineBytes) __builtin_prefetch(next + at);
      __builtin_prefetch(next + table.row_bytes - 1);
    }
    const uint8_t* const row = table.data + rows[i] * table.row_bytes;
    uint64_t word;
    int64_t at = 0;
    for (; at + 8 <= table.row_bytes; at += 8) {
      std::memcpy(&word, row + at, sizeof(word));
      folded ^= word;
    }
    for (; at < table.row_bytes; ++at) folded ^= row[at];
  }
  return folded;
}

}  // namespace xlarank
