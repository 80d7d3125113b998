#include "infer_message.h"

#include <limits>
#include <utility>

namespace xlarank {
namespace {

// Fields of ModelInferRequest and of its InferInputTensor.
constexpr uint32_t kInputs = 5, kRawContents = 7, kLastField = 7;
constexpr uint32_t kName = 1, kDatatype = 2, kShape = 3;

// A field of a message in protobuf's wire format: https://protobuf.dev/programming-guides/encoding.
struct Field {
  uint32_t number = 0;
  std::string_view whole, content;
};

class FieldReader {
 public:
  explicit FieldReader(std::string_view data) : data_(data) {}

  bool at_end() const { return at_ == data_.size(); }

  // The next field; false unless it is of bytes and whole. Tags of one byte are all that these messages have.
  bool next(Field& field) {
    const size_t begin = at_;
    const auto tag = static_cast<uint8_t>(data_[at_++]);
    uint64_t size = 0;
    if ((tag & 0x87) != 2 || !varint(size) || size > data_.size() - at_) return false;
    field.number = tag >> 3;
    field.content = data_.substr(at_, size);
    at_ += size;
    field.whole = data_.substr(begin, at_ - begin);
    return true;
  }

  bool varint(uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 64 && !at_end(); shift += 7) {
      const auto byte = static_cast<uint8_t>(data_[at_++]);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

 private:
  std::string_view data_;
  size_t at_ = 0;
};

// Of what a model has a name for. Other texts are for the parser: it looks whether they are UTF-8.
bool is_ascii(std::string_view text) {
  uint8_t bits = 0;
  for (const char c : text) bits |= static_cast<uint8_t>(c);
  return bits < 0x80;
}

bool read_input(std::string_view data, WireTensor& tensor) {
  FieldReader reader(data);
  bool seen[kShape + 1] = {};
  for (Field field; !reader.at_end();) {
    if (!reader.next(field) || field.number < kName || field.number > kShape || seen[field.number]) return false;
    seen[field.number] = true;
    if (field.number == kName) {
      tensor.name = field.content;
    } else if (field.number == kDatatype) {
      tensor.datatype = field.content;
    } else {
      FieldReader sizes(field.content);
      while (!sizes.at_end()) {
        uint64_t size = 0;
        if (tensor.rank == 2 || !sizes.varint(size) || size > std::numeric_limits<int32_t>::max()) return false;
        tensor.shape[tensor.rank++] = static_cast<int64_t>(size);
      }
    }
  }
  return is_ascii(tensor.name) && is_ascii(tensor.datatype);
}

}  // namespace

bool InferMessage::read(std::string_view data) {
  FieldReader reader(data);
  for (Field field; !reader.at_end();) {
    if (!reader.next(field) || field.number == 0 || field.number > kLastField) return false;
    if (field.number == kInputs) {
      if (!read_input(field.content, inputs.emplace_back())) return false;
    } else if (field.number == kRawContents) {
      raws.push_back(field.content);
    } else {
      rest.append(field.whole);
    }
  }
  return inputs.size() == raws.size();
}

void InferForms::add(std::string name, std::string datatype, int64_t item_bytes, int64_t width, bool has_columns) {
  positions_.emplace(name, static_cast<int64_t>(forms_.size()));
  forms_.push_back({std::move(name), std::move(datatype), item_bytes, width, has_columns});
}

int64_t InferForms::position(std::string_view name, size_t expected) const {
  if (expected < forms_.size() && forms_[expected].name == name) return static_cast<int64_t>(expected);
  const auto found = positions_.find(std::string(name));
  return found == positions_.end() ? -1 : found->second;
}

bool InferForms::locate(std::string_view data, const InferMessage& message, std::vector<WireSpan>& spans) const {
  spans.assign(forms_.size(), {});
  for (size_t i = 0, expected = 0; i < message.inputs.size(); ++i) {
    const WireTensor& tensor = message.inputs[i];
    const int64_t at = position(tensor.name, expected);  // most clients keep the order of the metadata
    if (at < 0) return false;
    expected = static_cast<size_t>(at) + 1;
    const Form& form = forms_[static_cast<size_t>(at)];
    WireSpan& span = spans[static_cast<size_t>(at)];
    const bool is_flat = tensor.rank == 1 && form.width == 1;
    const bool is_wide = tensor.rank == 2 && form.has_columns && tensor.shape[1] == form.width;
    if (span.offset >= 0 || tensor.datatype != form.datatype || !(is_flat || is_wide)) return false;
    const std::string_view raw = message.raws[i];
    span.offset = raw.data() - data.data();
    span.size = static_cast<int64_t>(raw.size());
    span.rows = tensor.shape[0];
    // No overflow: rows fit into 31 bits, and a width is a number of columns that a model has.
    if (form.item_bytes && span.size != span.rows * form.width * form.item_bytes) return false;
  }
  return true;
}

}  // namespace xlarank
