// The Python door of the feature store.
#pragma once

#include <nanobind/nanobind.h>

namespace xlarank {

void define_features(nanobind::module_& module);

}  // namespace xlarank
