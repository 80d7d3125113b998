// The Python door of messages that bring requests.
#pragma once

#include <nanobind/nanobind.h>

namespace xlarank {

void define_infer_messages(nanobind::module_& module);

}  // namespace xlarank
