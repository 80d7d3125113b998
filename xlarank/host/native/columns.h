// Python columns of a request as pointers.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <deque>

#include "buffers.h"
#include "plan.h"

namespace xlarank {

using Buffers = std::deque<Buffer>;  // never moves its buffers

// Strings of a StringColumn, after their offsets were checked; false if they aren't in the kernel's form.
bool read_strings(PyObject* blob, PyObject* offsets, Buffers& buffers, Strings& strings, int64_t& num_strings);

// Points `column` at a column of spec/columns.py; `buffers` keeps the memory. False if its form isn't that of
// the feature: dtypes, ranks, strides, lengths that don't add up, offsets that fall.
bool read_column(const Feature& feature, nanobind::handle object, Buffers& buffers, Column& column);

}  // namespace xlarank
