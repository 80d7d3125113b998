#include "preprocess.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "hashing.h"

namespace xlarank {
namespace {

// One float through the default and the operations of column k.
float transform(const Feature& feature, float value, int64_t k) {
  if (feature.has_default && std::isnan(value)) value = feature.default_value;
  for (const DenseOperation& operation : feature.operations) {
    switch (operation.type) {
      case DenseOperation::Type::kLog1p:
        // In double and rounded, so that every libm gives the same float.
        value = static_cast<float>(std::log1p(static_cast<double>(value)));
        break;
      case DenseOperation::Type::kClip: {
        // NaN fails both comparisons and passes through, as in NumPy.
        const float low = operation.first[0], high = operation.second[0];
        value = value < low ? low : value;
        value = value > high ? high : value;
        break;
      }
      case DenseOperation::Type::kStandardise: {
        const size_t at = operation.first.size() == 1 ? 0 : static_cast<size_t>(k);
        value = (value - operation.first[at]) / operation.second[at];
        break;
      }
    }
  }
  return value;
}

int64_t bucket_of(const std::vector<float>& boundaries, float value) {
  // NaN sorts last, as in NumPy.
  if (std::isnan(value)) return static_cast<int64_t>(boundaries.size());
  return std::upper_bound(boundaries.begin(), boundaries.end(), value) - boundaries.begin();
}

bool in_range(int64_t row, int64_t num_rows) { return static_cast<uint64_t>(row) < static_cast<uint64_t>(num_rows); }

// Applies the table's policy to a row number.
int32_t place(const Table& table, int64_t row, bool& valid) {
  if (in_range(row, table.num_rows)) return static_cast<int32_t>(row);
  switch (table.out_of_range) {
    case OutOfRange::kError:
      valid = false;
      return -1;
    case OutOfRange::kZero:
      return -1;
    case OutOfRange::kClip:
      return static_cast<int32_t>(row < 0 ? 0 : table.num_rows - 1);
    case OutOfRange::kHash:
      return static_cast<int32_t>(hash_int64(row, 0) % static_cast<uint64_t>(table.num_rows));
  }
  return -1;
}

bool accepts_floats(const Feature& feature, const Column& column) {
  bool finite = true, nan = false;
  float smallest = INFINITY;
  for (int64_t i = 0; i < column.num_values; ++i) {
    const float value = load<float>(column.floats + i);
    nan |= std::isnan(value);
    finite &= !std::isinf(value);
    smallest = value < smallest ? value : smallest;
  }
  if (!finite || (nan && !feature.has_default)) return false;
  return !feature.checks_log1p || smallest > -1;
}

bool accepts_strings(const Column& column, int64_t num_strings) {
  int64_t previous = 0;
  for (int64_t i = 0; i <= num_strings; ++i) {
    const int64_t offset = load<int64_t>(column.strings.offsets + i);
    if (offset < previous) return false;
    previous = offset;
  }
  return true;
}

}  // namespace

bool accepts(const Feature& feature, const Table* table, const Column& column) {
  switch (feature.type) {
    case ValueType::kFloat32:
      return accepts_floats(feature, column);
    case ValueType::kString:
      return accepts_strings(column, column.num_values);
    case ValueType::kInt64:
      break;
  }
  if (feature.rows_from != RowsFrom::kId || table->out_of_range != OutOfRange::kError) return true;
  bool valid = true;
  for (int64_t i = 0; i < column.num_values; ++i) {
    valid &= in_range(load<int64_t>(column.integers + i), table->num_rows);
  }
  return valid;
}

void write_dense(const Feature& feature, const Column& column, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  const int64_t width = feature.width;
  const float* values = column.floats + begin * width;
  const bool copies = !feature.has_default && feature.operations.empty();
  for (int64_t row = begin; row < end; ++row, values += width, out += stride) {
    if (copies) {
      std::memcpy(out, values, static_cast<size_t>(width) * sizeof(float));
      continue;
    }
    for (int64_t k = 0; k < width; ++k) out[k] = transform(feature, load<float>(values + k), k);
  }
}

bool resolve_rows(const Feature& feature, const Table& table, const Column& column, int64_t begin, int64_t end,
                  int32_t* rows) {
  bool valid = true;
  const int64_t count = end - begin;
  const int64_t* const integers = column.integers + (column.integers ? begin : 0);
  switch (feature.rows_from) {
    case RowsFrom::kId: {
      bool all_in_range = true;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = load<int64_t>(integers + i);
        rows[i] = static_cast<int32_t>(row);
        all_in_range &= in_range(row, table.num_rows);
      }
      if (all_in_range) return true;
      for (int64_t i = 0; i < count; ++i) rows[i] = place(table, load<int64_t>(integers + i), valid);
      return valid;
    }
    case RowsFrom::kHash: {
      const uint64_t num_rows = static_cast<uint64_t>(table.num_rows);
      for (int64_t i = 0; i < count; ++i) {
        uint64_t hash;
        if (feature.type == ValueType::kString) {
          const int64_t from = load<int64_t>(column.strings.offsets + begin + i);
          const int64_t to = load<int64_t>(column.strings.offsets + begin + i + 1);
          hash = hash_bytes(column.strings.blob + from, static_cast<size_t>(to - from), feature.hash_seed);
        } else {
          hash = hash_int64(load<int64_t>(integers + i), feature.hash_seed);
        }
        rows[i] = static_cast<int32_t>(hash % num_rows);
      }
      return valid;
    }
    case RowsFrom::kVocabulary:
      if (feature.string_vocabulary) {
        feature.string_vocabulary->lookup(column.strings, static_cast<size_t>(begin), static_cast<size_t>(count),
                                          rows);
      } else if (feature.int_vocabulary) {
        feature.int_vocabulary->lookup(integers, static_cast<size_t>(count), rows);
      } else {
        std::fill(rows, rows + count, 0);
      }
      break;
    case RowsFrom::kBucketise:
      for (int64_t i = 0; i < count; ++i) {
        const float value = transform(feature, load<float>(column.floats + begin + i), 0);
        rows[i] = static_cast<int32_t>(bucket_of(feature.boundaries, value));
      }
      break;
  }
  for (int64_t i = 0; i < count; ++i) rows[i] = place(table, rows[i], valid);
  return valid;
}

}  // namespace xlarank
