// What the memory gives: the bar that the lookup is measured against.
#pragma once

#include <cstdint>

#include "pool.h"

namespace xlarank {

// Reads from every line of the rows named, `table.ahead` rows prefetched, and does nothing with it but to fold a
// byte every 64 and the last into the number returned.
uint64_t read_rows(const TableView& table, const int32_t* rows, int64_t num_rows);

}  // namespace xlarank
