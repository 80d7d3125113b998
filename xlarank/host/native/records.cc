#include "records.h"

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

}  // namespace

RecordLayout::RecordLayout(std::vector<Feature> features) : features_(std::move(features)) {
  for (const Feature& feature : features_) {
    const bool ragged = feature.kind == Kind::kIdList || feature.kind == Kind::kSequence;
    const bool strings = feature.type == ValueType::kString;
    fields_.push_back(Field{ragged, strings, fixed_bytes_});
    varies_ |= ragged || strings;
    if (ragged || strings) {
      fixed_bytes_ += ragged && strings ? 8 : 4;
    } else {
      fixed_bytes_ += feature.type == ValueType::kInt64 ? 8 : 4 * static_cast<size_t>(feature.width);
    }
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

std::vector<RecordLayout::Totals> RecordLayout::totals_of(const std::vector<const Record*>& records) const {
  std::vector<Totals> totals(fields_.size());
  if (!varies_) return totals;
  for (const Record* record : records) {
    const uint8_t* const begin = payload(record);
    for (size_t i = 0; i < fields_.size(); ++i) {
      const Field& field = fields_[i];
      if (field.ragged) totals[i].values += load<uint32_t>(begin + field.begin);
      if (field.strings) totals[i].bytes += load<uint32_t>(begin + field.begin + (field.ragged ? 4 : 0));
    }
  }
  return totals;
}

std::vector<ColumnData> RecordLayout::columns_of(const std::vector<const Record*>& records,
                                                 const std::vector<bool>& wanted) const {
  const size_t num_rows = records.size();
  const std::vector<Totals> totals = totals_of(records);
  std::vector<ColumnData> columns(fields_.size());
  std::vector<size_t> value_at(fields_.size(), 0), byte_at(fields_.size(), 0);
  for (size_t i = 0; i < fields_.size(); ++i) {
    if (!wanted[i]) continue;
    const Field& field = fields_[i];
    const size_t num_values = field.ragged ? totals[i].values : num_rows;
    if (field.ragged) columns[i].lengths.allocate(num_rows);
    if (field.strings) {
      columns[i].blob.allocate(totals[i].bytes);
      columns[i].offsets.allocate(num_values + 1);
      columns[i].offsets.data[0] = 0;
    } else if (features_[i].type == ValueType::kInt64) {
      columns[i].integers.allocate(num_values);
    } else {
      columns[i].floats.allocate(num_rows * static_cast<size_t>(features_[i].width));
    }
  }
  // Record by record: each is read once, while its lines are in cache.
  for (size_t row = 0; row < num_rows; ++row) {
    const uint8_t* const begin = payload(records[row]);
    const uint8_t* more = begin + fixed_bytes_;
    for (size_t i = 0; i < fields_.size(); ++i) {
      const Field& field = fields_[i];
      const uint8_t* const fixed = begin + field.begin;
      ColumnData& column = columns[i];
      if (!field.ragged && !field.strings) {
        if (!wanted[i]) continue;
        if (features_[i].type == ValueType::kInt64) {
          column.integers.data[row] = load<int64_t>(fixed);
        } else if (features_[i].width == 1) {
          column.floats.data[row] = load<float>(fixed);
        } else {
          const size_t width = static_cast<size_t>(features_[i].width);
          std::memcpy(column.floats.data.get() + row * width, fixed, 4 * width);
        }
        continue;
      }
      const size_t values = field.ragged ? load<uint32_t>(fixed) : 1;
      const size_t bytes = field.strings ? load<uint32_t>(fixed + (field.ragged ? 4 : 0)) : 8 * values;
      const uint8_t* const sizes = more;
      if (field.ragged && field.strings) more += 4 * values;
      const uint8_t* const data = more;
      more += bytes;
      if (!wanted[i]) continue;
      if (field.ragged) column.lengths.data[row] = static_cast<int32_t>(values);
      if (!field.strings) {
        if (values) std::memcpy(column.integers.data.get() + value_at[i], data, bytes);
        value_at[i] += values;
        continue;
      }
      if (bytes) std::memcpy(column.blob.data.get() + byte_at[i], data, bytes);
      for (size_t value = 0; value < values; ++value) {
        byte_at[i] += field.ragged ? load<uint32_t>(sizes + 4 * value) : bytes;
        column.offsets.data[++value_at[i]] = static_cast<int64_t>(byte_at[i]);
      }
    }
  }
  return columns;
}

}  // namespace xlarank
