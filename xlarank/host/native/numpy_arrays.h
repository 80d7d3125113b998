// C++ arrays as numpy arrays that own them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace xlarank {

template <class Item, class T>
nanobind::object items_to_numpy(std::vector<T>&& values) {
  auto* const owned = new std::vector<T>(std::move(values));
  nanobind::capsule owner(owned, [](void* pointer) noexcept { delete static_cast<std::vector<T>*>(pointer); });
  Item* const data = reinterpret_cast<Item*>(owned->data());
  const size_t size = owned->size() * (sizeof(T) / sizeof(Item));
  return nanobind::cast(nanobind::ndarray<nanobind::numpy, Item, nanobind::ndim<1>>(data, {size}, owner));
}

template <class T>
nanobind::object to_numpy(std::vector<T>&& values) {
  return items_to_numpy<T>(std::move(values));
}

// The bytes of structures.
template <class T>
nanobind::object bytes_to_numpy(std::vector<T>&& values) {
  return items_to_numpy<uint8_t>(std::move(values));
}

}  // namespace xlarank
