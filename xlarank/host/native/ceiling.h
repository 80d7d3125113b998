// What the memory gives: the bar that the lookup is measured against.
#pragma once

#include <cstdint>

#include "pool.h"

namespace xlarank {

// Reads every byte of the rows named, `table.ahead` rows prefetched, and does nothing with them but to fold
// them into the number returned.
uint64_t read_rows(const TableView& table, const int32_t* rows, int64_t num_rows);

}  // namespace xlarank
