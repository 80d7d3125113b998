#include "ceiling.h"

namespace xlarank {
namespace {

// kBytes: of a row where that is known when this is compiled, as the lookup that this is a bar for knows it; else 0.
template <int64_t kBytes>
uint64_t read(const TableView& table, const int32_t* rows, int64_t num_rows) {
  uint64_t sum = 0;
  const int64_t bytes = kBytes ? kBytes : table.row_bytes;
  const auto row = [&](int64_t at) { return table.data + rows[at] * bytes; };
  const auto each_line = [bytes](const uint8_t* first, const auto& body) {
    if constexpr (kBytes) {
#pragma GCC unroll 16
      for (int64_t line = 0; line < kBytes; line += kLineBytes) body(first + line);
    } else {
      for_each_line(first, bytes, body);
    }
  };
  const auto touch = [&](const uint8_t* line) { sum += *line; };
  const auto prefetch = [](const uint8_t* line) { __builtin_prefetch(line); };
  int64_t i = 0;
  for (; table.ahead && i < num_rows - table.ahead; ++i) {
    each_line(row(i + table.ahead), prefetch);
    each_line(row(i), touch);
  }
  for (; i < num_rows; ++i) each_line(row(i), touch);
  return sum;
}

}  // namespace

uint64_t read_rows(const TableView& table, const int32_t* rows, int64_t num_rows) {
  // Rows of whole lines, that begin with one.
  if (reinterpret_cast<uintptr_t>(table.data) % kLineBytes == 0) {
    if (table.row_bytes == kLineBytes) return read<kLineBytes>(table, rows, num_rows);
    if (table.row_bytes == 2 * kLineBytes) return read<2 * kLineBytes>(table, rows, num_rows);
    if (table.row_bytes == 4 * kLineBytes) return read<4 * kLineBytes>(table, rows, num_rows);
    if (table.row_bytes == 8 * kLineBytes) return read<8 * kLineBytes>(table, rows, num_rows);
  }
  return read<0>(table, rows, num_rows);
}

}  // namespace xlarank
