// The tensors of a serialised ModelInferRequest (Open Inference Protocol), found without parsing it whole.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace xlarank {

// An input as the message describes it.
struct WireTensor {
  std::string_view name, datatype;
  int64_t shape[2] = {1, 1};
  int rank = 0;
};

// Parts of a message; views into its bytes.
struct InferMessage {
  std::vector<WireTensor> inputs;
  std::vector<std::string_view> raws;  // as many as inputs
  std::string rest;                    // the other fields, a message of the same type

  // Reads `data`. False for what is malformed, and for what is seldom sent and left to others: inputs with
  // typed contents or parameters, of more than two axes, twice described; fields that the protocol doesn't have.
  bool read(std::string_view data);
};

// Where the raw contents of an input are.
struct WireSpan {
  int64_t offset = -1;  // in the message; -1 for an input that wasn't sent
  int64_t size = 0;     // bytes
  int64_t rows = 0;
};

// The inputs that a model takes, each in the one form that is usual.
class InferForms {
 public:
  // Adds [rows, width] items of a datatype; of `item_bytes`, or 0 for strings. Where the width is 1, [rows]
  // will do, and without `has_columns` nothing else.
  void add(std::string name, std::string datatype, int64_t item_bytes, int64_t width, bool has_columns);

  // Spans by input, in the order that they were added in. False for a message that has another input, one
  // twice, or one in another form or size.
  bool locate(std::string_view data, const InferMessage& message, std::vector<WireSpan>& spans) const;

 private:
  struct Form {
    std::string name, datatype;
    int64_t item_bytes, width;
    bool has_columns;
  };
  int64_t position(std::string_view name, size_t expected) const;

  std::vector<Form> forms_;
  std::unordered_map<std::string, int64_t> positions_;
};

}  // namespace xlarank
