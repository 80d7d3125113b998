// A model as the kernel sees it, and a request as pointers. Plain data; no Python.
#pragma once

#include <cstdint>
#include <vector>

#include "pool.h"
#include "vocabulary.h"

namespace xlarank {

enum class Kind { kDense, kId, kIdList, kSequence };
enum class Scope { kContext, kCandidate };
enum class ValueType { kFloat32, kInt64, kString };
enum class RowsFrom { kId, kHash, kVocabulary, kBucketise };
enum class Combiner { kSum, kMean, kSqrtn };
enum class OutOfRange { kError, kZero, kClip, kHash };
enum class Dtype { kFloat32, kBfloat16, kBool, kInt32 };  // of outputs

struct Table {
  TableView view;
  int64_t num_rows;  // in [1, 2**31)
  OutOfRange out_of_range;
  bool is_updatable = false;
  int64_t num_device_rows = 0;             // K; place K on the device reads as zeros
  const int32_t* device_places = nullptr;  // [num_rows], -1: on the host alone; null: a row's place is its number
};

struct DenseOperation {
  enum class Type { kLog1p, kClip, kStandardise };
  Type type;
  std::vector<float> first;   // clip: {low}; standardise: means, one or one a column
  std::vector<float> second;  // clip: {high}; standardise: stds
};

struct Feature {
  Kind kind;
  Scope scope;
  ValueType type;
  int64_t width = 1;       // floats a row of a dense feature
  int64_t table = -1;      // index in Plan::tables; -1 for dense
  Combiner combiner = Combiner::kSum;
  int64_t max_length = 0;  // 0 = no limit; a bag keeps its last ids
  bool has_default = false;
  float default_value = 0;  // stands in for NaN
  std::vector<DenseOperation> operations;
  bool checks_log1p = false;  // whether a value <= -1 would reach log1p, which refuses it
  RowsFrom rows_from = RowsFrom::kId;
  uint64_t hash_seed = 0;
  const IntVocabulary* int_vocabulary = nullptr;
  const StringVocabulary* string_vocabulary = nullptr;  // both null: an empty vocabulary
  std::vector<float> boundaries;
  int64_t leaf = 0;   // index of the output; -1: the model ignores the feature, and nothing is gathered
  int64_t begin = 0;  // first column in it; a sequence owns its leaf, its mask is leaf + 1
  int64_t places_leaf = -1;   // output of the places of rows that the device looks up; -1: it looks up none
  int64_t divisor_leaf = -1;  // output of what it divides their sum by; -1: nothing
};

struct Leaf {
  Scope scope;
  Dtype dtype;
  int64_t row_items;
  int64_t row_bytes;
};

inline bool is_float(Dtype dtype) { return dtype == Dtype::kFloat32 || dtype == Dtype::kBfloat16; }
inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kBool ? 1 : dtype == Dtype::kBfloat16 ? 2 : 4; }

struct Plan {
  std::vector<Table> tables;
  std::vector<Feature> features;
  std::vector<Leaf> leaves;  // in the order of the signature; request_of_row last
};

// Raw values of one feature for num_rows rows. Pointers may be unaligned.
struct Column {
  int64_t num_rows = 0;
  int64_t num_values = 0;
  const float* floats = nullptr;      // kFloat32: [num_rows, width]
  const int64_t* integers = nullptr;  // kInt64
  Strings strings;                    // kString
  std::vector<int64_t> bags;          // lists: bag i is values [bags[i], bags[i + 1])
};

struct Request {
  int64_t num_candidates = 0;
  std::vector<Column> columns;  // one a feature
};

}  // namespace xlarank
