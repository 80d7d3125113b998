#include "lookup.h"

#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "ceiling.h"
#include "parsing.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xlarank {
namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// Row numbers of a table, all of them in range.
const int32_t* rows_of(const Table& table, const Buffer& ids) {
  require(ids.is('i', 4, 1), "expected C-contiguous int32 ids of rank 1");
  const int32_t* const rows = ids.data<const int32_t>();
  for (int64_t i = 0; i < ids.size(0); ++i) require(rows[i] >= 0 && rows[i] < table.num_rows, "an id is out of range");
  return rows;
}

// Sums of bags of equal length, into out [num_bags, dim] float32.
void pool_rows(const nb::dict& fields, nb::handle ids, int64_t ids_a_bag, nb::handle out, const std::string& isa) {
  Buffers buffers;
  const Table table = parse_table(fields, buffers);
  const Buffer& read = buffers.emplace_back(ids.ptr());
  const int32_t* const rows = rows_of(table, read);
  const Buffer& written = buffers.emplace_back(out.ptr(), true);
  const IsaFunctions* const functions = isa_functions(isa.c_str());
  require(functions, "this CPU doesn't run that form of the kernel");
  require(ids_a_bag >= 1, "expected at least one id a bag");
  const int64_t num_bags = read.size(0) / ids_a_bag;
  require(num_bags * ids_a_bag == read.size(0) && written.bytes() == num_bags * table.view.dim * 4,
          "expected whole bags, and a writable C-contiguous array of one vector each");
  const nb::gil_scoped_release release;
  std::vector<int64_t> bounds(static_cast<size_t>(num_bags) + 1);
  for (size_t bag = 0; bag < bounds.size(); ++bag) bounds[bag] = static_cast<int64_t>(bag) * ids_a_bag;
  const Bags bags{rows, bounds.data(), num_bags, read.size(0)};
  functions->pool(table.view, bags, Divide::kNo, written.data<float>(), table.view.dim);
}

uint64_t read_table_rows(const nb::dict& fields, nb::handle ids) {
  Buffers buffers;
  const Table table = parse_table(fields, buffers);
  const Buffer& read = buffers.emplace_back(ids.ptr());
  const int32_t* const rows = rows_of(table, read);
  const nb::gil_scoped_release release;
  return read_rows(table.view, rows, read.size(0));
}

}  // namespace

Table parse_table(const nb::dict& fields, Buffers& buffers) {
  const bool is_updatable = nb::cast<bool>(fields["is_updatable"]);
  const Buffer& rows = buffers.emplace_back(nb::object(fields["rows"]).ptr(), is_updatable);
  require(rows.is('u', 1, 2), "expected the encoded rows of a table: C-contiguous uint8 of rank 2, writable if it is updatable");
  const auto format =
      parse<RowFormat>(fields, "format", {"float32", "float16", "bfloat16", "int8", "int4"});
  const int64_t num_rows = rows.size(0), row_bytes = rows.size(1);
  const int64_t dim = nb::cast<int64_t>(fields["dim"]), lines = nb::cast<int64_t>(fields["lines_ahead"]);
  require(num_rows >= 1 && num_rows < (int64_t{1} << 31), "expected a number of rows in [1, 2**31)");
  require(dim >= 1 && dim < (int64_t{1} << 31) && encoded_bytes(format, dim) <= row_bytes,
          "expected rows that hold dim values");
  require(lines >= 0, "expected lines_ahead >= 0");
  const auto policy = parse<OutOfRange>(fields, "out_of_range", {"error", "zero", "clip", "hash"});
  const TableView view{rows.data<const uint8_t>(), format, row_bytes, dim, rows_ahead(lines, row_bytes)};
  return Table{view, num_rows, policy, is_updatable};
}

void define_lookup(nb::module_& module) {
  module.def("pool_rows", &pool_rows, "table"_a, "ids"_a, "ids_a_bag"_a, "out"_a, "isa"_a);
  module.def("read_rows", &read_table_rows, "table"_a, "ids"_a);
}

}  // namespace xlarank
