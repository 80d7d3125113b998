#include "ceiling.h"

namespace xlarank {

uint64_t read_rows(const TableView& table, const int32_t* rows, int64_t num_rows) {
  uint64_t sum = 0;
  const int64_t last = table.row_bytes - 1;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (table.ahead && i + table.ahead < num_rows) {
      const uint8_t* const next = table.data + rows[i + table.ahead] * table.row_bytes;
      for (int64_t at = 0; at < last; at += kLineBytes) __builtin_prefetch(next + at);
      __builtin_prefetch(next + last);
    }
    const uint8_t* const row = table.data + rows[i] * table.row_bytes;
    for (int64_t at = 0; at < last; at += kLineBytes) sum += row[at];
    sum += row[last];
  }
  return sum;
}

}  // namespace xlarank
