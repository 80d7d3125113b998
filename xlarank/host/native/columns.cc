#include "columns.h"

#include "hashing.h"

namespace nb = nanobind;

namespace xlarank {
namespace {

// An attribute, or an empty object where there is none.
nb::object attribute(nb::handle object, const char* name) {
  PyObject* const value = PyObject_GetAttrString(object.ptr(), name);
  if (!value) PyErr_Clear();
  return nb::steal(value);
}

bool read_values(const Feature& feature, nb::handle object, Buffers& buffers, Column& column) {
  if (feature.type == ValueType::kString) {
    const nb::object blob = attribute(object, "blob"), offsets = attribute(object, "offsets");
    return blob.is_valid() && offsets.is_valid() &&
           read_strings(blob.ptr(), offsets.ptr(), buffers, column.strings, column.num_values);
  }
  const Buffer& values = buffers.emplace_back(object.ptr());
  if (feature.type == ValueType::kInt64) {
    if (!values.is('i', 8, 1)) return false;
    column.integers = values.data<const int64_t>();
    column.num_values = values.size(0);
    return true;
  }
  const bool dense = feature.kind == Kind::kDense;
  if (!values.is('f', 4, dense ? 2 : 1) || (dense && values.size(1) != feature.width)) return false;
  column.floats = values.data<const float>();
  column.num_values = values.size(0) * feature.width;
  return true;
}

}  // namespace

bool read_strings(PyObject* blob, PyObject* offsets, Buffers& buffers, Strings& strings, int64_t& num_strings) {
  const Buffer& bytes = buffers.emplace_back(blob);
  const Buffer& ends = buffers.emplace_back(offsets);
  if (!bytes.is('u', 1, 1) || !ends.is('i', 8, 1) || ends.size(0) < 1) return false;
  strings = Strings{bytes.data<const uint8_t>(), ends.data<const int64_t>()};
  num_strings = ends.size(0) - 1;
  int64_t previous = load<int64_t>(strings.offsets);
  bool rises = previous == 0;
  for (int64_t i = 1; i <= num_strings; ++i) {
    const int64_t offset = load<int64_t>(strings.offsets + i);
    rises &= offset >= previous;
    previous = offset;
  }
  return rises && previous == bytes.size(0);
}

bool read_column(const Feature& feature, nb::handle object, Buffers& buffers, Column& column) {
  const bool ragged = feature.kind == Kind::kIdList || feature.kind == Kind::kSequence;
  if (!ragged) {
    if (!read_values(feature, object, buffers, column)) return false;
    column.num_rows = column.num_values / feature.width;
    return true;
  }
  const nb::object values = attribute(object, "values"), lengths = attribute(object, "lengths");
  if (!values.is_valid() || !lengths.is_valid()) return false;
  if (!read_values(feature, values, buffers, column)) return false;
  const Buffer& sizes = buffers.emplace_back(lengths.ptr());
  if (!sizes.is('i', 4, 1)) return false;
  column.num_rows = sizes.size(0);
  column.bags.resize(static_cast<size_t>(column.num_rows) + 1);
  column.bags[0] = 0;
  bool valid = true;
  for (int64_t row = 0; row < column.num_rows; ++row) {
    const int32_t length = load<int32_t>(sizes.data<const int32_t>() + row);
    valid &= length >= 0;
    column.bags[static_cast<size_t>(row) + 1] = column.bags[static_cast<size_t>(row)] + length;
  }
  return valid && column.bags.back() == column.num_values;
}

}  // namespace xlarank
