// Names that Python states to the kernel, as enums.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace xlarank {

// Position of a name among an enum's, in the order of the C++ enumerators.
template <class E>
E parse(nanobind::handle value, const char* key, std::initializer_list<const char*> names) {
  const std::string name = nanobind::cast<std::string>(value);
  int position = 0;
  for (const char* candidate : names) {
    if (name == candidate) return static_cast<E>(position);
    ++position;
  }
  throw std::invalid_argument(std::string(key) + ": the kernel doesn't know '" + name + "'");
}

template <class E>
E parse(const nanobind::dict& fields, const char* key, std::initializer_list<const char*> names) {
  return parse<E>(nanobind::object(fields[key]), key, names);
}

}  // namespace xlarank
