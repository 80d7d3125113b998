// What the memory gives: the bar that the lookup is measured against.
#pragma once

#include <cstdint>

#include "pool.h"

namespace xlarank {

// Touches every line of the rows named, prefetching `table.ahead` rows in front, and does no more than to add up
// one byte of each: those at multiples of 64 from the row's first, and the row's last.
uint64_t read_rows(const TableView& table, const int32_t* rows, int64_t num_rows);

}  // namespace xlarank
