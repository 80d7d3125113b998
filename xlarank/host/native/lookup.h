// Tables from Python, and lookups in one of them without a model: for tuning and benchmarks.
#pragma once

#include <nanobind/nanobind.h>

#include "columns.h"
#include "plan.h"

namespace xlarank {

// A table of the dict that xlarank/host/plan.py makes; `buffers` keeps its memory. Throws std::invalid_argument
// if rows, format and dim contradict each other.
Table parse_table(const nanobind::dict& fields, Buffers& buffers);

// Adds `pool_rows` and `read_rows`.
void define_lookup(nanobind::module_& module);

}  // namespace xlarank
