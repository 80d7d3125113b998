#include "infer_door.h"

#include <nanobind/stl/string.h>

#include <string_view>
#include <utility>
#include <vector>

#include "infer_message.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xlarank {
namespace {

// A message and the bytes that its views are of.
struct HeldMessage {
  nb::bytes data;
  InferMessage parts;

  std::string_view view() const { return {data.c_str(), data.size()}; }
};

nb::object read(nb::bytes data) {
  HeldMessage message{std::move(data), {}};
  if (!message.parts.read(message.view())) return nb::none();
  return nb::cast(std::move(message));
}

// [offset, size, rows] of each input, one after the other; None if the message isn't of these forms.
nb::object locate(const InferForms& forms, const HeldMessage& message) {
  std::vector<WireSpan> spans;
  if (!forms.locate(message.view(), message.parts, spans)) return nb::none();
  nb::list flat;
  for (const WireSpan& span : spans) {
    flat.append(span.offset);
    flat.append(span.size);
    flat.append(span.rows);
  }
  return flat;
}

}  // namespace

void define_infer_messages(nb::module_& module) {
  nb::class_<HeldMessage>(module, "InferMessage")
      .def_static("read", &read, "data"_a)
      .def_prop_ro("num_inputs", [](const HeldMessage& self) { return self.parts.inputs.size(); })
      .def_prop_ro("rest", [](const HeldMessage& self) {
        return nb::bytes(self.parts.rest.data(), self.parts.rest.size());
      });
  nb::class_<InferForms>(module, "InferForms")
      .def(nb::init<>())
      .def("add", &InferForms::add, "name"_a, "datatype"_a, "item_bytes"_a, "width"_a, "has_columns"_a)
      .def("locate", &locate, "message"_a);
}

}  // namespace xlarank
