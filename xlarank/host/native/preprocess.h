// Raw values to floats and row numbers: the same as xlarank/host/preprocessing.py, bit for bit.
#pragma once

#include <cstdint>

#include "plan.h"

namespace xlarank {

// Whether every value is one that check_contents in Python accepts. A column's form is right already.
bool accepts(const Feature& feature, const Table* table, const Column& column);

// Writes rows [begin, end) of a dense column to out, `stride` floats from row to row.
void write_dense(const Feature& feature, const Column& column, int64_t begin, int64_t end, float* out,
                 int64_t stride);

// Row numbers of values [begin, end): in [0, num_rows), or -1 for a row of zeros. False if a value is out
// of range under policy error; it reads as zeros.
bool resolve_rows(const Feature& feature, const Table& table, const Column& column, int64_t begin, int64_t end,
                  int32_t* rows);

}  // namespace xlarank
