// The Python door of the kernel: checks what memory safety needs, points, releases the GIL, calls.
// Good messages are the Python side's work.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "columns.h"
#include "features_door.h"
#include "gather.h"
#include "hashing.h"
#include "infer_door.h"
#include "lookup.h"
#include "numpy_arrays.h"
#include "parsing.h"
#include "preprocess.h"
#include "stamps.h"
#include "vocabulary.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xlarank {
namespace {

// Scans of more values than this leave the GIL to others; for less, taking it back costs more.
constexpr int64_t kValuesWithGil = 65536;

Leaf parse_leaf(const nb::tuple& fields) {
  const Scope scope = parse<Scope>(nb::object(fields[0]), "scope", {"context", "candidate"});
  const Dtype dtype = parse<Dtype>(nb::object(fields[1]), "dtype", {"float32", "bfloat16", "bool", "int32"});
  const int64_t row_items = nb::cast<int64_t>(fields[2]);
  return Leaf{scope, dtype, row_items, row_items * bytes_of(dtype)};
}

const int64_t* int64_values(const Buffer& buffer) {
  if (!buffer.is('i', 8, 1)) throw std::invalid_argument("expected a C-contiguous int64 array of rank 1");
  return buffer.data<const int64_t>();
}

Strings string_values(nb::handle blob, nb::handle offsets, Buffers& buffers, int64_t& num_strings) {
  Strings strings;
  if (!read_strings(blob.ptr(), offsets.ptr(), buffers, strings, num_strings)) {
    throw std::invalid_argument("expected uint8 bytes and int64 string offsets that rise from 0 to their number");
  }
  return strings;
}

nb::object hash_ints(nb::handle values, uint64_t seed) {
  const Buffer buffer(values.ptr());
  const int64_t* const data = int64_values(buffer);
  std::vector<uint64_t> hashes(static_cast<size_t>(buffer.size(0)));
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < hashes.size(); ++i) hashes[i] = hash_int64(load<int64_t>(data + i), seed);
  }
  return to_numpy(std::move(hashes));
}

nb::object hash_texts(nb::handle blob, nb::handle offsets, uint64_t seed) {
  Buffers buffers;
  int64_t num_strings = 0;
  const Strings strings = string_values(blob, offsets, buffers, num_strings);
  std::vector<uint64_t> hashes(static_cast<size_t>(num_strings));
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < hashes.size(); ++i) {
      const int64_t from = load<int64_t>(strings.offsets + i), to = load<int64_t>(strings.offsets + i + 1);
      hashes[i] = hash_bytes(strings.blob + from, static_cast<size_t>(to - from), seed);
    }
  }
  return to_numpy(std::move(hashes));
}

template <class Lookup>
nb::object look_up(int64_t num_values, const Lookup& lookup) {
  std::vector<int64_t> wide(static_cast<size_t>(num_values));
  {
    nb::gil_scoped_release release;
    std::vector<int32_t> rows(wide.size());
    lookup(rows.data());
    std::copy(rows.begin(), rows.end(), wide.begin());
  }
  return to_numpy(std::move(wide));
}

// Elements of a BYTES tensor: 4 bytes of length, little-endian, then the bytes.
nb::tuple split_bytes_tensor(nb::handle raw) {
  const Buffer buffer(raw.ptr());
  if (!buffer.is('u', 1, 1)) throw std::invalid_argument("expected a bytes-like object");
  const uint8_t* const data = buffer.data<const uint8_t>();
  const int64_t size = buffer.size(0);
  std::vector<int64_t> offsets{0};
  std::vector<uint8_t> blob;
  {
    nb::gil_scoped_release release;
    blob.reserve(static_cast<size_t>(size));
    for (int64_t at = 0; at < size;) {
      const int64_t left = size - at;
      const auto refuse = [&](int64_t expected, const char* what, int64_t have) {
        throw std::invalid_argument("element " + std::to_string(offsets.size() - 1) + ": expected " +
                                    std::to_string(expected) + what + ", " + std::to_string(have) + " are left");
      };
      if (left < 4) refuse(4, " bytes of length", left);
      const int64_t length = load<uint32_t>(data + at);
      if (length > left - 4) refuse(length, " bytes", left - 4);
      blob.insert(blob.end(), data + at + 4, data + at + 4 + length);
      offsets.push_back(static_cast<int64_t>(blob.size()));
      at += 4 + length;
    }
  }
  return nb::make_tuple(to_numpy(std::move(blob)), to_numpy(std::move(offsets)));
}

DenseOperation parse_operation(const nb::tuple& fields) {
  const std::string name = nb::cast<std::string>(fields[0]);
  using Type = DenseOperation::Type;
  const Type type = name == "log1p" ? Type::kLog1p : name == "clip" ? Type::kClip : Type::kStandardise;
  return DenseOperation{type, nb::cast<std::vector<float>>(fields[1]), nb::cast<std::vector<float>>(fields[2])};
}

Feature parse_feature(const nb::dict& fields) {
  Feature feature;
  feature.kind = parse<Kind>(fields, "kind", {"dense", "id", "id_list", "sequence"});
  feature.places_leaf = nb::cast<int64_t>(fields["places_leaf"]);
  feature.divisor_leaf = nb::cast<int64_t>(fields["divisor_leaf"]);
  feature.scope = parse<Scope>(fields, "scope", {"context", "candidate"});
  feature.type = parse<ValueType>(fields, "dtype", {"float32", "int64", "string"});
  feature.rows_from = parse<RowsFrom>(fields, "rows_from", {"id", "hash", "vocabulary", "bucketise"});
  feature.combiner = parse<Combiner>(fields, "combiner", {"sum", "mean", "sqrtn"});
  feature.width = nb::cast<int64_t>(fields["width"]);
  feature.table = nb::cast<int64_t>(fields["table"]);
  feature.max_length = nb::cast<int64_t>(fields["max_length"]);
  feature.has_default = nb::cast<bool>(fields["has_default"]);
  feature.default_value = nb::cast<float>(fields["default_value"]);
  feature.checks_log1p = nb::cast<bool>(fields["checks_log1p"]);
  feature.hash_seed = nb::cast<uint64_t>(fields["hash_seed"]);
  for (nb::handle operation : nb::list(fields["operations"])) {
    feature.operations.push_back(parse_operation(nb::cast<nb::tuple>(operation)));
  }
  feature.boundaries = nb::cast<std::vector<float>>(fields["boundaries"]);
  const nb::object vocabulary = nb::borrow(fields["vocabulary"]);
  if (!vocabulary.is_none()) {
    if (feature.type == ValueType::kString) {
      feature.string_vocabulary = nb::cast<const StringVocabulary*>(vocabulary);
    } else {
      feature.int_vocabulary = nb::cast<const IntVocabulary*>(vocabulary);
    }
  }
  feature.leaf = nb::cast<int64_t>(fields["leaf"]);
  feature.begin = nb::cast<int64_t>(fields["begin"]);
  return feature;
}

// A request of one kernel, and the Python memory that it points at.
struct BoundColumns {
  BoundColumns() = default;
  BoundColumns(const BoundColumns&) = delete;

  uint64_t kernel = 0;
  Request request;
  Buffers buffers;
};

class Kernel {
 public:
  Kernel(const nb::list& tables, const nb::list& features, const nb::list& leaves, int num_threads,
         const std::string& isa)
      : isa_(isa_functions(isa.c_str())), threads_(num_threads) {
    if (!isa_) throw std::invalid_argument("this CPU doesn't run the kernel's '" + isa + "' form");
    for (nb::handle item : tables) {
      Table table = parse_table(nb::cast<nb::dict>(item), buffers_);
      make_stamps(nb::cast<nb::dict>(item), table);
      read_device_places(nb::cast<nb::dict>(item), table);
      plan_.tables.push_back(table);
    }
    for (nb::handle item : features) {
      const nb::dict fields = nb::cast<nb::dict>(item);
      plan_.features.push_back(parse_feature(fields));
      vocabularies_.push_back(nb::borrow(fields["vocabulary"]));
    }
    watch_ = std::make_unique<RepeatWatch>(plan_.features.size());
    for (nb::handle item : leaves) {
      plan_.leaves.push_back(parse_leaf(nb::cast<nb::tuple>(item)));
    }
    check_plan();
  }

  // How far in front of a lookup to prefetch, in rows of each table.
  nb::list rows_ahead() const {
    nb::list rows;
    for (const Table& table : plan_.tables) rows.append(table.view.ahead);
    return rows;
  }

  // Whether check_contents would accept: false also for forms that it may accept after a look.
  bool accepts(const nb::object& columns) const {
    const nb::tuple items(columns);
    if (items.size() != plan_.features.size()) return false;
    Buffers buffers;
    std::vector<Column> read(plan_.features.size());
    int64_t num_values = 0;
    for (size_t i = 0; i < read.size(); ++i) {
      if (!read_column(plan_.features[i], items[i], buffers, read[i])) return false;
      num_values += read[i].num_values;
    }
    if (num_values <= kValuesWithGil) return accepts_all(read);
    nb::gil_scoped_release release;
    return accepts_all(read);
  }

  // None if a column isn't in the kernel's form.
  std::unique_ptr<BoundColumns> bind(const nb::object& columns, int64_t num_candidates) const {
    const nb::tuple items(columns);
    if (items.size() != plan_.features.size()) return nullptr;
    auto bound = std::make_unique<BoundColumns>();
    bound->kernel = id_;
    bound->request.num_candidates = num_candidates;
    bound->request.columns.resize(plan_.features.size());
    for (size_t i = 0; i < plan_.features.size(); ++i) {
      const Feature& feature = plan_.features[i];
      Column& column = bound->request.columns[i];
      if (!read_column(feature, items[i], bound->buffers, column)) return nullptr;
      if (column.num_rows != (feature.scope == Scope::kContext ? 1 : num_candidates)) return nullptr;
    }
    return bound;
  }

  int64_t gather_batch(const nb::list& parts, int64_t num_rows, int64_t num_requests, const nb::list& out) {
    std::vector<Segment> segments;
    segments.reserve(parts.size());
    int64_t total = 0;
    for (nb::handle part : parts) {
      const nb::tuple fields = nb::cast<nb::tuple>(part);
      const auto& bound = nb::cast<const BoundColumns&>(fields[0]);
      const int64_t begin = nb::cast<int64_t>(fields[1]), end = nb::cast<int64_t>(fields[2]);
      if (bound.kernel != id_) throw std::invalid_argument("a segment was bound by another kernel");
      if (begin < 0 || begin >= end || end > bound.request.num_candidates) {
        throw std::invalid_argument("a segment leaves its request");
      }
      segments.push_back(Segment{&bound.request, begin, end});
      total += end - begin;
    }
    if (segments.empty() || total > num_rows || static_cast<int64_t>(segments.size()) > num_requests) {
      throw std::invalid_argument("the bucket doesn't hold the segments");
    }
    if (out.size() != plan_.leaves.size()) throw std::invalid_argument("expected one array a leaf");
    Buffers buffers;
    std::vector<uint8_t*> leaves;
    for (size_t i = 0; i < plan_.leaves.size(); ++i) {
      const Buffer& leaf = buffers.emplace_back(nb::handle(out[i]).ptr(), true);
      const int64_t rows = plan_.leaves[i].scope == Scope::kContext ? num_requests : num_rows;
      if (leaf.bytes() != rows * plan_.leaves[i].row_bytes) {
        throw std::invalid_argument("expected writable C-contiguous arrays of the bucket's size");
      }
      leaves.push_back(leaf.data<uint8_t>());
    }
    nb::gil_scoped_release release;
    return gather(plan_, *isa_, threads_, *watch_, segments, num_rows, num_requests, leaves);
  }

  // Writes encoded rows [n, row_bytes] to an updatable table, in order, each at once for whoever reads.
  void update_rows(int64_t table_index, nb::handle rows, nb::handle encoded) {
    if (table_index < 0 || table_index >= static_cast<int64_t>(plan_.tables.size())) {
      throw std::invalid_argument("there is no such table");
    }
    const Table& table = plan_.tables[static_cast<size_t>(table_index)];
    uint32_t* const stamps = stamps_[static_cast<size_t>(table_index)];
    uint8_t* const journal = journals_[static_cast<size_t>(table_index)];
    if (!stamps) throw std::invalid_argument("the table isn't updatable");
    const Buffer numbers(rows.ptr()), values(encoded.ptr());
    if (!numbers.is('i', 4, 1) || !values.is('u', 1, 2) || numbers.size(0) != values.size(0) ||
        values.size(1) != table.view.row_bytes) {
      throw std::invalid_argument("expected int32 row numbers and one encoded row each");
    }
    const int32_t* const at = numbers.data<const int32_t>();
    const int64_t count = numbers.size(0), row_bytes = table.view.row_bytes;
    for (int64_t i = 0; i < count; ++i) {
      if (at[i] < 0 || at[i] >= table.num_rows) throw std::invalid_argument("a row number is out of range");
    }
    uint8_t* const data = const_cast<uint8_t*>(table.view.data);  // its buffer was asked for as writable
    const nb::gil_scoped_release release;
    const std::lock_guard lock(updates_);
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* const to = data + at[i] * row_bytes;
      const uint8_t* const from = values.data<const uint8_t>() + i * row_bytes;
      if (journal) {
        write_row_for_all(stamps, at[i], to, from, row_bytes, journal);
      } else {
        write_row(stamps, at[i], to, from, row_bytes);
      }
    }
  }

 private:
  static uint64_t next_id() {
    static std::atomic<uint64_t> last{0};
    return ++last;
  }

  static void check(bool holds) {
    if (!holds) throw std::invalid_argument("kernel: the plan contradicts itself");
  }

  // An updatable table's stamps: of this process, or, with a journal, in memory that others write to as well.
  void make_stamps(const nb::dict& fields, Table& table) {
    stamps_.push_back(nullptr);
    journals_.push_back(nullptr);
    if (!table.is_updatable) return;
    if (nb::object(fields["stamps"]).is_none()) {
      own_stamps_.push_back(std::make_unique<uint32_t[]>(kNumStamps));  // zeros
      stamps_.back() = own_stamps_.back().get();
    } else {
      const Buffer& stamps = buffers_.emplace_back(nb::handle(fields["stamps"]).ptr(), true);
      const Buffer& journal = buffers_.emplace_back(nb::handle(fields["journal"]).ptr(), true);
      const int64_t num_bytes = static_cast<int64_t>(sizeof(int64_t)) + table.view.row_bytes;
      check(stamps.is('u', 4, 1) && stamps.size(0) == kNumStamps);
      check(journal.is('u', 1, 1) && journal.size(0) == num_bytes);
      stamps_.back() = stamps.data<uint32_t>();
      journals_.back() = journal.data<uint8_t>();
      check(reinterpret_cast<uintptr_t>(journals_.back()) % sizeof(int64_t) == 0);
    }
    table.view.stamps = stamps_.back();
  }

  void read_device_places(const nb::dict& fields, Table& table) {
    table.num_device_rows = nb::cast<int64_t>(fields["num_device_rows"]);
    check(table.num_device_rows >= 0 && table.num_device_rows <= table.num_rows);
    const nb::object places(fields["device_places"]);
    if (places.is_none()) return check(table.num_device_rows == 0 || table.num_device_rows == table.num_rows);
    const Buffer& read = buffers_.emplace_back(places.ptr());
    check(read.is('i', 4, 1) && read.size(0) == table.num_rows);
    table.device_places = read.data<const int32_t>();
    for (int64_t row = 0; row < table.num_rows; ++row) check(table.device_places[row] < table.num_device_rows);
  }

  // Places of features lie inside their leaves and tables exist: gather relies on it.
  void check_plan() const {
    check(!plan_.leaves.empty());
    check(plan_.leaves.back().dtype == Dtype::kInt32 && plan_.leaves.back().row_items == 1);
    for (const Feature& feature : plan_.features) {
      check(feature.width >= 1 && feature.max_length >= 0 && feature.begin >= 0);
      check(feature.kind == Kind::kDense ||
            (feature.table >= 0 && feature.table < static_cast<int64_t>(plan_.tables.size())));
      if (feature.leaf != -1) check_place(feature);
      for (const DenseOperation& operation : feature.operations) {
        const size_t count = operation.first.size();
        check(count == operation.second.size());
        check(operation.type == DenseOperation::Type::kLog1p || count == 1 ||
              static_cast<int64_t>(count) == feature.width);
      }
    }
  }

  void check_place(const Feature& feature) const {
    const bool sequence = feature.kind == Kind::kSequence;
    check(feature.leaf >= 0 && feature.leaf + sequence + 1 < static_cast<int64_t>(plan_.leaves.size()));
    const Leaf& leaf = plan_.leaves[static_cast<size_t>(feature.leaf)];
    check(is_float(leaf.dtype) && leaf.scope == feature.scope);
    const bool dense = feature.kind == Kind::kDense;
    const int64_t floats = dense ? feature.width : plan_.tables[static_cast<size_t>(feature.table)].view.dim;
    if (!dense) check_device_leaves(feature);
    if (!sequence) return check(feature.begin + floats <= leaf.row_items);
    const Leaf& mask = plan_.leaves[static_cast<size_t>(feature.leaf) + 1];
    check(mask.dtype == Dtype::kBool && mask.scope == feature.scope && mask.row_items == feature.max_length);
    check(feature.max_length >= 1 && feature.begin == 0 && feature.max_length * floats == leaf.row_items);
  }

  void check_device_leaves(const Feature& feature) const {
    const auto check_leaf = [&](int64_t index, Dtype dtype) -> int64_t {
      check(index >= 0 && index < static_cast<int64_t>(plan_.leaves.size()));
      const Leaf& leaf = plan_.leaves[static_cast<size_t>(index)];
      check(leaf.dtype == dtype && leaf.scope == feature.scope);
      return leaf.row_items;
    };
    if (feature.places_leaf == -1) return check(feature.divisor_leaf == -1);
    check(plan_.tables[static_cast<size_t>(feature.table)].num_device_rows > 0);
    const int64_t capacity = check_leaf(feature.places_leaf, Dtype::kInt32);
    if (feature.kind == Kind::kSequence) check(capacity == feature.max_length);
    if (feature.divisor_leaf != -1) check(check_leaf(feature.divisor_leaf, Dtype::kFloat32) == 1);
  }

  bool accepts_all(const std::vector<Column>& columns) const {
    for (size_t i = 0; i < columns.size(); ++i) {
      const Feature& feature = plan_.features[i];
      const Table* const table = feature.table < 0 ? nullptr : &plan_.tables[static_cast<size_t>(feature.table)];
      if (!xlarank::accepts(feature, table, columns[i])) return false;
    }
    return true;
  }

  const uint64_t id_ = next_id();
  Plan plan_;
  Buffers buffers_;                        // memory of the tables
  std::vector<nb::object> vocabularies_;  // keeps what the plan points at
  std::vector<std::unique_ptr<uint32_t[]>> own_stamps_;
  std::vector<uint32_t*> stamps_;   // by table; null if it isn't updatable
  std::vector<uint8_t*> journals_;  // by table; null if no other process writes it
  std::mutex updates_;              // held by the writer of rows; other processes are the caller's affair
  const IsaFunctions* isa_;
  std::unique_ptr<RepeatWatch> watch_;
  ThreadPool threads_;
};

}  // namespace
}  // namespace xlarank

NB_MODULE(_native, module) {
  using namespace xlarank;
  // At exit threads may still hold kernels; the process takes their memory with it.
  nb::set_leak_warnings(false);
  module.doc() = "The native kernel of xlarank.host; see the Python modules beside it.";
  module.def("hash_int64", &hash_ints, "values"_a, "seed"_a);
  module.def("hash_strings", &hash_texts, "blob"_a, "offsets"_a, "seed"_a);
  module.def("split_bytes_tensor", &split_bytes_tensor, "raw"_a);
  define_lookup(module);
  define_infer_messages(module);

  nb::class_<IntVocabulary>(module, "IntVocabulary")
      .def(
          "__init__",
          [](IntVocabulary* self, nb::handle values) {
            const Buffer buffer(values.ptr());
            const int64_t* const data = int64_values(buffer);
            new (self) IntVocabulary(data, static_cast<size_t>(buffer.size(0)));
          },
          "values"_a)
      .def(
          "lookup",
          [](const IntVocabulary& self, nb::handle values) {
            const Buffer buffer(values.ptr());
            const int64_t* const data = int64_values(buffer);
            const int64_t count = buffer.size(0);
            return look_up(count, [&](int32_t* rows) { self.lookup(data, static_cast<size_t>(count), rows); });
          },
          "values"_a);

  nb::class_<StringVocabulary>(module, "StringVocabulary")
      .def(
          "__init__",
          [](StringVocabulary* self, nb::handle blob, nb::handle offsets) {
            Buffers buffers;
            int64_t count = 0;
            const Strings strings = string_values(blob, offsets, buffers, count);
            new (self) StringVocabulary(strings, static_cast<size_t>(count));
          },
          "blob"_a, "offsets"_a)
      .def(
          "lookup",
          [](const StringVocabulary& self, nb::handle blob, nb::handle offsets) {
            Buffers buffers;
            int64_t count = 0;
            const Strings strings = string_values(blob, offsets, buffers, count);
            return look_up(count, [&](int32_t* rows) { self.lookup(strings, 0, static_cast<size_t>(count), rows); });
          },
          "blob"_a, "offsets"_a);

  define_features(module);
  nb::class_<BoundColumns>(module, "BoundColumns");
  nb::class_<Kernel>(module, "Kernel")
      .def(nb::init<const nb::list&, const nb::list&, const nb::list&, int, const std::string&>(), "tables"_a,
           "features"_a, "leaves"_a, "num_threads"_a, "isa"_a)
      .def("accepts", &Kernel::accepts, "columns"_a)
      .def("bind", &Kernel::bind, "columns"_a, "num_candidates"_a)
      .def("update_rows", &Kernel::update_rows, "table"_a, "rows"_a, "encoded"_a)
      .def_prop_ro("rows_ahead", &Kernel::rows_ahead)
      .def("gather", &Kernel::gather_batch, "segments"_a, "rows"_a, "requests"_a, "out"_a);
}
