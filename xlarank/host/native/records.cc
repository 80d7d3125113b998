#include "records.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "hashing.h"

namespace xlarank {
namespace {

constexpr size_t kMaxPayload = size_t{1} << 31;

template <class T>
uint8_t* store(uint8_t* out, T value) {
  std::memcpy(out, &value, sizeof(T));
  return out + sizeof(T);
}

// What varies in a row: how many values, and bytes if they are strings.
struct Span {
  int64_t begin, end;  // values
  int64_t from, to;    // bytes
};

Span span_of(const Column& column, bool ragged, bool strings, int64_t row) {
  Span span{row, row + 1, 0, 0};
  if (ragged) {
    span.begin = column.bags[static_cast<size_t>(row)];
    span.end = column.bags[static_cast<size_t>(row) + 1];
  }
  if (strings) {
    span.from = load<int64_t>(column.strings.offsets + span.begin);
    span.to = load<int64_t>(column.strings.offsets + span.end);
  }
  return span;
}

// Bytes of the last strings of a list.
size_t bytes_of_last(size_t count, const uint8_t* sizes, size_t num_values) {
  size_t bytes = 0;
  for (size_t i = num_values - count; i < num_values; ++i) bytes += load<uint32_t>(sizes + 4 * i);
  return bytes;
}

}  // namespace

RecordLayout::RecordLayout(std::vector<Feature> features) : features_(std::move(features)) {
  for (const Feature& feature : features_) {
    const bool ragged = feature.kind == Kind::kIdList || feature.kind == Kind::kSequence;
    const bool strings = feature.type == ValueType::kString;
    size_t bytes = ragged && strings ? 8 : 4;
    if (!ragged && !strings) bytes = feature.type == ValueType::kInt64 ? 8 : 4 * static_cast<size_t>(feature.width);
    const size_t most = feature.max_length ? static_cast<size_t>(feature.max_length) : SIZE_MAX;
    fields_.push_back(Field{ragged, strings, fixed_bytes_, bytes, most});
    fixed_bytes_ += bytes;
    varies_ |= ragged || strings;
  }
}

size_t RecordLayout::payload_bytes(const std::vector<Column>& columns, int64_t row) const {
  size_t bytes = fixed_bytes_;
  for (size_t i = 0; i < fields_.size(); ++i) {
    const Field& field = fields_[i];
    if (!field.ragged && !field.strings) continue;
    const Span span = span_of(columns[i], field.ragged, field.strings, row);
    bytes += static_cast<size_t>(span.to - span.from);
    if (field.ragged) bytes += static_cast<size_t>(span.end - span.begin) * (field.strings ? 4 : 8);
    if (bytes > kMaxPayload) throw std::length_error("a row of more than 2 GiB");
  }
  return bytes;
}

void RecordLayout::write(const std::vector<Column>& columns, int64_t row, uint8_t* out) const {
  uint8_t* more = out + fixed_bytes_;
  for (size_t i = 0; i < fields_.size(); ++i) {
    const Field& field = fields_[i];
    const Column& column = columns[i];
    uint8_t* const fixed = out + field.begin;
    if (!field.ragged && !field.strings) {
      if (features_[i].type == ValueType::kInt64) {
        std::memcpy(fixed, column.integers + row, 8);
      } else {
        const size_t width = static_cast<size_t>(features_[i].width);
        std::memcpy(fixed, column.floats + static_cast<size_t>(row) * width, 4 * width);
      }
      continue;
    }
    const Span span = span_of(column, field.ragged, field.strings, row);
    const size_t values = static_cast<size_t>(span.end - span.begin), bytes = static_cast<size_t>(span.to - span.from);
    uint8_t* const next = field.ragged ? store(fixed, static_cast<uint32_t>(values)) : fixed;
    if (!field.strings) {
      if (values) std::memcpy(more, column.integers + span.begin, 8 * values);
      more += 8 * values;
      continue;
    }
    store(next, static_cast<uint32_t>(bytes));
    for (int64_t value = span.begin; field.ragged && value < span.end; ++value) {
      const int64_t* const offset = column.strings.offsets + value;
      more = store(more, static_cast<uint32_t>(load<int64_t>(offset + 1) - load<int64_t>(offset)));
    }
    if (bytes) std::memcpy(more, column.strings.blob + span.from, bytes);
    more += bytes;
  }
}

bool RecordLayout::is_whole(const uint8_t* payload, size_t size) const {
  if (size < fixed_bytes_) return false;
  size_t at = fixed_bytes_;
  for (const Field& field : fields_) {
    if (!field.ragged && !field.strings) continue;
    const uint8_t* const fixed = payload + field.begin;
    const size_t first = load<uint32_t>(fixed);  // 2**32 values of 8 bytes don't overflow size_t
    if (!field.ragged || !field.strings) {
      at += field.ragged ? 8 * first : first;
      if (at > size) return false;
      continue;
    }
    const size_t bytes = load<uint32_t>(fixed + 4);
    if (at + 4 * first > size) return false;
    size_t sum = 0;
    for (size_t i = 0; i < first; ++i) sum += load<uint32_t>(payload + at + 4 * i);
    at += 4 * first + bytes;
    if (sum != bytes || at > size) return false;
  }
  return at == size;
}

Place RecordLayout::place_of(size_t feature) const {
  if (fields_[feature].ragged || fields_[feature].strings) return Place::kOthers;
  if (features_[feature].type == ValueType::kInt64) return Place::kIntegers;
  const bool one = features_[feature].kind == Kind::kDense && features_[feature].width == 1;
  return one ? Place::kFloats : Place::kOthers;
}

// Feature by feature: loops without branches over records that are in cache by now.
Columns RecordLayout::columns_of(const std::vector<const Record*>& records, const std::vector<bool>& wanted,
                                 size_t limit) const {
  size_t counts[3] = {};
  Columns columns;
  for (size_t i = 0; i < fields_.size(); ++i) {
    counts[static_cast<int>(place_of(i))] += wanted[i];
    const bool varies = fields_[i].ragged || fields_[i].strings;
    if (wanted[i] && !varies) columns.bytes += fields_[i].bytes * records.size();
  }
  const bool fixed_fits = columns.bytes <= limit;
  if (fixed_fits) {
    columns.floats.allocate(counts[static_cast<int>(Place::kFloats)] * records.size());
    columns.integers.allocate(counts[static_cast<int>(Place::kIntegers)] * records.size());
  }
  columns.others.resize(fields_.size());
  float* floats = columns.floats.data.get();
  int64_t* integers = columns.integers.data.get();
  std::vector<const uint8_t*> more;  // of each record, where what varies of the next feature begins
  if (varies_) {
    more.reserve(records.size());
    for (const Record* record : records) more.push_back(payload(record) + fixed_bytes_);
  }
  for (size_t i = 0; i < fields_.size(); ++i) {
    const Field& field = fields_[i];
    if (field.ragged || field.strings) {
      read_varying(i, records, wanted[i], limit, more, columns);
    } else if (!wanted[i] || !fixed_fits) {
      continue;
    } else if (place_of(i) == Place::kFloats) {
      for (const Record* record : records) *floats++ = load<float>(payload(record) + field.begin);
    } else if (place_of(i) == Place::kIntegers) {
      for (const Record* record : records) *integers++ = load<int64_t>(payload(record) + field.begin);
    } else {
      read_floats(i, records, columns.others[i]);
    }
  }
  if (columns.bytes <= limit) return columns;
  Columns none;
  none.floats.allocate(0);
  none.integers.allocate(0);
  none.bytes = columns.bytes;
  return none;
}

void RecordLayout::read_floats(size_t feature, const std::vector<const Record*>& records, ColumnData& column) const {
  const size_t width = static_cast<size_t>(features_[feature].width);
  column.floats.allocate(records.size() * width);
  float* out = column.floats.data.get();
  for (const Record* record : records) {
    std::memcpy(out, payload(record) + fields_[feature].begin, 4 * width);
    out += width;
  }
}

void RecordLayout::read_varying(size_t feature, const std::vector<const Record*>& records, bool wanted, size_t limit,
                                std::vector<const uint8_t*>& more, Columns& columns) const {
  const Field& field = fields_[feature];
  ColumnData& column = columns.others[feature];
  const size_t num_rows = records.size(), bytes_at = field.begin + (field.ragged ? 4 : 0);
  size_t num_values = 0, num_bytes = 0;
  for (size_t row = 0; row < num_rows; ++row) {
    const uint8_t* const fixed = payload(records[row]);
    const size_t values = field.ragged ? load<uint32_t>(fixed + field.begin) : 1;
    const size_t kept = std::min(values, field.most);
    num_values += kept;
    if (!field.strings) continue;
    num_bytes += kept == values ? load<uint32_t>(fixed + bytes_at) : bytes_of_last(kept, more[row], values);
  }
  if (wanted) {
    columns.bytes += (field.strings ? 4 : 8) * num_values + num_bytes + (field.ragged ? 4 * num_rows : 0);
    wanted = columns.bytes <= limit;
  }
  if (wanted) {
    if (field.ragged) column.lengths.allocate(num_rows);
    if (field.strings) {
      column.blob.allocate(num_bytes);
      column.offsets.allocate(num_values + 1);
      column.offsets.data[0] = 0;
    } else {
      column.integers.allocate(num_values);
    }
  }
  size_t value = 0, byte = 0;
  for (size_t row = 0; row < num_rows; ++row) {
    const uint8_t* const fixed = payload(records[row]);
    const size_t values = field.ragged ? load<uint32_t>(fixed + field.begin) : 1;
    const size_t bytes = field.strings ? load<uint32_t>(fixed + bytes_at) : 8 * values;
    const uint8_t* const sizes = more[row];
    const uint8_t* const data = sizes + (field.ragged && field.strings ? 4 * values : 0);
    more[row] = data + bytes;
    if (!wanted) continue;
    const size_t kept = std::min(values, field.most), skipped = values - kept;
    if (field.ragged) column.lengths.data[row] = static_cast<int32_t>(kept);
    if (!field.strings) {
      const uint8_t* const first = data + 8 * skipped;
      for (size_t k = 0; k < kept; ++k) column.integers.data[value + k] = load<int64_t>(first + 8 * k);
      value += kept;
      continue;
    }
    const size_t kept_bytes = skipped ? bytes_of_last(kept, sizes, values) : bytes;
    if (kept_bytes) std::memcpy(column.blob.data.get() + byte, data + bytes - kept_bytes, kept_bytes);
    for (size_t k = skipped; k < values; ++k) {
      byte += field.ragged ? load<uint32_t>(sizes + 4 * k) : bytes;
      column.offsets.data[++value] = static_cast<int64_t>(byte);
    }
  }
}

}  // namespace xlarank
