// A candidate's raw features as one block of bytes, written once and never changed. Plain data; no Python.
//
//   Record { id, size } and behind it `size` bytes:
//     a fixed part, one field a feature: its floats; its integer; or, where a row's size varies, how much of it
//       there is: uint32 bytes of a string, uint32 values of a list, uint32 values and bytes of a list of strings;
//     then what varies, in the order of features: bytes; int64 values; uint32 sizes and bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "plan.h"

namespace xlarank {

struct Record {
  int64_t id;
  uint32_t size;  // bytes behind it
  uint32_t unused;
};

inline const uint8_t* payload(const Record* record) { return reinterpret_cast<const uint8_t*>(record + 1); }

// An array that isn't cleared first.
template <class T>
struct Array {
  std::unique_ptr<T[]> data;
  size_t size = 0;

  void allocate(size_t count) {
    data.reset(new T[count]);
    size = count;
  }
};

// A column of spec/columns.py: what of it isn't used stays empty.
struct ColumnData {
  Array<float> floats;      // [n * width]
  Array<int64_t> integers;  // [n] or [V]
  Array<uint8_t> blob;      // bytes of all strings
  Array<int64_t> offsets;   // [strings + 1]
  Array<int32_t> lengths;   // [n] of a list
};

// Columns of wanted features. Those of one number a row share two blocks, in the order of features: making an
// array for Python costs more than filling it.
struct Columns {
  Array<float> floats;              // [F, n] of dense features of width 1
  Array<int64_t> integers;          // [F, n] of integer ids
  std::vector<ColumnData> others;   // one a feature, empty where it isn't wanted or is in a block
  size_t bytes = 0;                 // of what is wanted, as raw contents of tensors would hold it
};

enum class Place { kFloats, kIntegers, kOthers };

class RecordLayout {
 public:
  // Only kind, type, width and max_length of a feature are looked at.
  explicit RecordLayout(std::vector<Feature> features);

  const std::vector<Feature>& features() const { return features_; }
  size_t fixed_bytes() const { return fixed_bytes_; }

  // Bytes of a row's payload; throws std::length_error past 2**31.
  size_t payload_bytes(const std::vector<Column>& columns, int64_t row) const;

  // Writes a row's payload of that many bytes.
  void write(const std::vector<Column>& columns, int64_t row, uint8_t* out) const;

  // Whether `size` bytes are a whole payload: nothing that it says of itself leads outside.
  bool is_whole(const uint8_t* payload, size_t size) const;

  // The columns of records, one row a record, of those features that are wanted; a list is its last max_length
  // values. If their bytes are more than `limit`, the columns are empty, and no more than it was allocated.
  Columns columns_of(const std::vector<const Record*>& records, const std::vector<bool>& wanted, size_t limit) const;

  // Where the column of a feature is.
  Place place_of(size_t feature) const;

 private:
  struct Field {
    bool ragged;
    bool strings;
    size_t begin;  // in the fixed part
    size_t bytes;  // of it
    size_t most;   // values that are read
  };

  void read_floats(size_t feature, const std::vector<const Record*>& records, ColumnData& column) const;

  // Counts the feature's bytes if it is wanted, and reads it if they fit into the limit. Also moves `more`, wanted
  // or not, behind what it passes.
  void read_varying(size_t feature, const std::vector<const Record*>& records, bool wanted, size_t limit,
                    std::vector<const uint8_t*>& more, Columns& columns) const;

  std::vector<Feature> features_;
  std::vector<Field> fields_;
  size_t fixed_bytes_ = 0;
  bool varies_ = false;  // whether any row has more than its fixed part
};

}  // namespace xlarank
