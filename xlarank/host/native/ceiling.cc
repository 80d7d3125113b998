#include "ceiling.h"

namespace xlarank {

uint64_t read_rows(const TableView& table, const int32_t* rows, int64_t num_rows) {
  uint64_t sum = 0;
  const auto row = [&](int64_t at) { return table.data + rows[at] * table.row_bytes; };
  const auto read = [&](const uint8_t* line) { sum += *line; };
  const auto prefetch = [](const uint8_t* line) { __builtin_prefetch(line); };
  int64_t i = 0;
  for (; table.ahead && i < num_rows - table.ahead; ++i) {
    for_each_line(row(i + table.ahead), table.row_bytes, prefetch);
    for_each_line(row(i), table.row_bytes, read);
  }
  for (; i < num_rows; ++i) for_each_line(row(i), table.row_bytes, read);
  return sum;
}

}  // namespace xlarank
