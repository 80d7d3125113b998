#include "features_door.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "columns.h"
#include "feature_table.h"
#include "hashing.h"
#include "numpy_arrays.h"
#include "parsing.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xlarank {
namespace {

template <class T>
nb::object to_numpy(Array<T>&& array) {
  T* const data = array.data.release();
  nb::capsule owner(data, [](void* pointer) noexcept { delete[] static_cast<T*>(pointer); });
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(data, {array.size}, owner));
}

// An array, (blob, offsets) of strings, or a list's (values, lengths).
nb::object to_python(const Feature& feature, ColumnData&& column) {
  nb::object values;
  if (feature.type == ValueType::kString) {
    values = nb::make_tuple(to_numpy(std::move(column.blob)), to_numpy(std::move(column.offsets)));
  } else if (feature.type == ValueType::kInt64) {
    values = to_numpy(std::move(column.integers));
  } else if (feature.kind == Kind::kDense) {
    values = to_numpy(std::move(column.floats));  // rows follow one another; the other side knows their width
  } else {
    values = to_numpy(std::move(column.floats));
  }
  if (!column.lengths.data) return values;
  return nb::make_tuple(values, to_numpy(std::move(column.lengths)));
}

// `max_lengths`: one a feature, 0 for no limit; or none at all.
RecordLayout parse_layout(const nb::list& features, const std::vector<int64_t>& max_lengths = {}) {
  std::vector<Feature> parsed;
  for (nb::handle item : features) {
    const nb::tuple fields = nb::cast<nb::tuple>(item);
    Feature feature;
    feature.kind = parse<Kind>(nb::object(fields[0]), "kind", {"dense", "id", "id_list", "sequence"});
    feature.scope = Scope::kCandidate;
    feature.type = parse<ValueType>(nb::object(fields[1]), "dtype", {"float32", "int64", "string"});
    feature.width = nb::cast<int64_t>(fields[2]);
    if (feature.width < 1) throw std::invalid_argument("expected features of width >= 1");
    parsed.push_back(feature);
  }
  if (!max_lengths.empty() && max_lengths.size() != parsed.size()) {
    throw std::invalid_argument("expected one max_length a feature");
  }
  for (size_t i = 0; i < max_lengths.size(); ++i) {
    if (max_lengths[i] < 0) throw std::invalid_argument("expected a max_length >= 0");
    const bool is_list = parsed[i].kind == Kind::kIdList || parsed[i].kind == Kind::kSequence;
    if (is_list) parsed[i].max_length = max_lengths[i];
  }
  return RecordLayout(std::move(parsed));
}

struct Ids {
  explicit Ids(nb::handle object) : buffer(object.ptr()) {
    if (!buffer.is('i', 8, 1)) throw std::invalid_argument("expected a C-contiguous int64 array of rank 1");
    data = buffer.data<const int64_t>();
    size = static_cast<size_t>(buffer.size(0));
  }
  const Buffer buffer;
  const int64_t* data;
  size_t size;
};

// Columns of as many rows as there are ids.
std::vector<Column> read_columns(const RecordLayout& layout, const nb::list& columns, size_t num_rows,
                                 Buffers& buffers) {
  const std::vector<Feature>& features = layout.features();
  if (columns.size() != features.size()) throw std::invalid_argument("expected one column a feature");
  std::vector<Column> read(features.size());
  for (size_t i = 0; i < read.size(); ++i) {
    if (!read_column(features[i], columns[i], buffers, read[i]) ||
        read[i].num_rows != static_cast<int64_t>(num_rows)) {
      throw std::invalid_argument("column " + std::to_string(i) + ": expected the form of its feature, one row an id");
    }
  }
  return read;
}

// A layout, a table, and the Python memory that the table's file is in.
class Door {
 public:
  Door(const nb::list& features, const std::vector<int64_t>& max_lengths, size_t limit, nb::handle index,
       nb::handle records)
      : layout_(parse_layout(features, max_lengths)) {
    FeatureFile file;
    if (!index.is_none()) {
      const Buffer& slots = buffers_.emplace_back(index.ptr());
      const Buffer& bytes = buffers_.emplace_back(records.ptr());
      if (!slots.is('u', 1, 1) || !bytes.is('u', 1, 1) || slots.size(0) % sizeof(FileSlot) != 0 ||
          reinterpret_cast<uintptr_t>(slots.data<const uint8_t>()) % kRecordAlignment != 0 ||
          reinterpret_cast<uintptr_t>(bytes.data<const uint8_t>()) % kRecordAlignment != 0) {
        throw std::invalid_argument("expected aligned bytes of index and records");
      }
      file = FeatureFile(slots.data<const FileSlot>(), static_cast<size_t>(slots.size(0)) / sizeof(FileSlot),
                         bytes.data<const uint8_t>(), static_cast<size_t>(bytes.size(0)));
      nb::gil_scoped_release release;
      const std::string fault = file.fault(layout_);
      if (!fault.empty()) throw std::invalid_argument(fault);
    }
    table_ = std::make_unique<FeatureTable>(layout_, limit, file);
  }

  // `max_bytes`: 0 for no limit.
  nb::tuple lookup(nb::handle ids, const std::vector<bool>& wanted, uint32_t oldest, size_t max_bytes) {
    const Ids keys(ids);
    if (wanted.size() != layout_.features().size()) throw std::invalid_argument("expected one flag a feature");
    FeatureLookup found;
    {
      nb::gil_scoped_release release;
      found = table_->lookup(keys.data, keys.size, wanted, oldest, max_bytes ? max_bytes : SIZE_MAX);
    }
    nb::list others;
    for (size_t i = 0; i < found.columns.others.size(); ++i) {
      if (!wanted[i] || layout_.place_of(i) != Place::kOthers) continue;
      others.append(to_python(layout_.features()[i], std::move(found.columns.others[i])));
    }
    return nb::make_tuple(to_numpy(std::move(found.columns.floats)), to_numpy(std::move(found.columns.integers)),
                          others, xlarank::to_numpy(std::move(found.missing)), found.columns.bytes);
  }

  void put(nb::handle ids, const nb::list& columns, nb::handle stamps, uint32_t time, uint32_t oldest) {
    const Ids keys(ids);
    Buffers buffers;
    const std::vector<Column> rows = read_columns(layout_, columns, keys.size, buffers);
    const uint64_t* since = nullptr;
    if (!stamps.is_none()) {
      const Buffer& values = buffers.emplace_back(stamps.ptr());
      if (!values.is('u', 8, 1) || static_cast<size_t>(values.size(0)) != keys.size) {
        throw std::invalid_argument("expected one stamp an id");
      }
      since = values.data<const uint64_t>();
    }
    nb::gil_scoped_release release;
    table_->put(keys.data, keys.size, rows, since, time, oldest);
  }

  int64_t remove(nb::handle ids, uint32_t time) {
    const Ids keys(ids);
    nb::gil_scoped_release release;
    return table_->remove(keys.data, keys.size, time);
  }

  nb::object stamps(nb::handle ids) {
    const Ids keys(ids);
    std::vector<uint64_t> stamps;
    {
      nb::gil_scoped_release release;
      stamps = table_->stamps(keys.data, keys.size);
    }
    return xlarank::to_numpy(std::move(stamps));
  }

  nb::dict stats() {
    FeatureStats stats;
    {
      nb::gil_scoped_release release;
      stats = table_->stats();
    }
    nb::dict fields;
    fields["rows"] = stats.rows;
    fields["rows_in_memory"] = stats.cached;
    fields["bytes"] = stats.bytes;
    fields["hits"] = stats.hits;
    fields["misses"] = stats.misses;
    fields["evictions"] = stats.evictions;
    fields["version"] = stats.version;
    fields["oldest"] = stats.oldest;
    return fields;
  }

 private:
  const RecordLayout layout_;
  Buffers buffers_;
  std::unique_ptr<FeatureTable> table_;
};

// Records back to back, as a file has them, and where each begins.
nb::tuple encode_records(const nb::list& features, nb::handle ids, const nb::list& columns) {
  const RecordLayout layout = parse_layout(features);
  const Ids keys(ids);
  Buffers buffers;
  const std::vector<Column> rows = read_columns(layout, columns, keys.size, buffers);
  std::vector<int64_t> places;
  std::vector<uint8_t> bytes;
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < keys.size; ++i) {
      const size_t size = layout.payload_bytes(rows, static_cast<int64_t>(i)), begin = bytes.size();
      const Record record{load<int64_t>(keys.data + i), static_cast<uint32_t>(size), 0};
      places.push_back(static_cast<int64_t>(begin));
      bytes.resize((begin + sizeof(Record) + size + kRecordAlignment - 1) / kRecordAlignment * kRecordAlignment);
      std::memcpy(bytes.data() + begin, &record, sizeof(Record));
      layout.write(rows, static_cast<int64_t>(i), bytes.data() + begin + sizeof(Record));
    }
  }
  return nb::make_tuple(xlarank::to_numpy(std::move(bytes)), xlarank::to_numpy(std::move(places)));
}

// The bytes of the index, or the two rows of an id that comes twice.
nb::tuple index_records(nb::handle ids, nb::handle places) {
  const Ids keys(ids), begins(places);
  if (keys.size != begins.size) throw std::invalid_argument("expected one place an id");
  int64_t twice[2] = {-1, -1};
  std::vector<FileSlot> slots;
  {
    nb::gil_scoped_release release;
    slots = build_index(keys.data, begins.data, keys.size, twice);
  }
  return nb::make_tuple(bytes_to_numpy(std::move(slots)), twice[0], twice[1]);
}

}  // namespace

void define_features(nb::module_& module) {
  module.def("encode_records", &encode_records, "features"_a, "ids"_a, "columns"_a);
  module.def("index_records", &index_records, "ids"_a, "places"_a);
  nb::class_<Door>(module, "FeatureTable")
      .def(nb::init<const nb::list&, const std::vector<int64_t>&, size_t, nb::handle, nb::handle>(), "features"_a,
           "max_lengths"_a, "limit"_a, "index"_a.none(), "records"_a.none())
      .def("lookup", &Door::lookup, "ids"_a, "wanted"_a, "oldest"_a, "max_bytes"_a)
      .def("put", &Door::put, "ids"_a, "columns"_a, "stamps"_a.none(), "time"_a, "oldest"_a)
      .def("remove", &Door::remove, "ids"_a, "time"_a)
      .def("stamps", &Door::stamps, "ids"_a)
      .def("stats", &Door::stats);
}

}  // namespace xlarank
