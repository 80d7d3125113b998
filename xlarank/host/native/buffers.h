// Python buffers as pointers.
#pragma once

#include <Python.h>

#include <cstdint>
#include <cstring>

namespace xlarank {

// A C-contiguous Python buffer, held until destroyed. Empty when the object has none.
class Buffer {
 public:
  // A writable one comes without the type of its items: the buffer protocol has none for bfloat16.
  explicit Buffer(PyObject* object, bool writable = false) {
    const int flags = PyBUF_ND | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : PyBUF_FORMAT);
    held_ = PyObject_GetBuffer(object, &view_, flags) == 0;
    if (!held_) PyErr_Clear();
  }
  Buffer(const Buffer&) = delete;  // a view's shape may point into the view itself
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (held_) PyBuffer_Release(&view_);
  }

  // Whether it holds items of a kind ('f' float, 'i' signed, 'u' unsigned, '?' bool), size and rank.
  bool is(char kind, Py_ssize_t item_bytes, int rank) const {
    if (!held_ || view_.itemsize != item_bytes || view_.ndim != rank) return false;
    const char* format = view_.format ? view_.format : "B";
    // '>' and '!' are big-endian: refused below as no kind of ours.
    if (*format && std::strchr("@=<^", *format)) ++format;
    if (!*format || format[1]) return false;
    const char* const known = kind == 'f' ? "fd" : kind == 'i' ? "bhilqn" : kind == 'u' ? "BHILQNc" : "?";
    return std::strchr(known, *format) != nullptr;
  }

  template <class T>
  T* data() const {
    return static_cast<T*>(view_.buf);
  }
  int64_t bytes() const { return held_ ? view_.len : 0; }
  int64_t size(int axis) const { return view_.shape[axis]; }

 private:
  Py_buffer view_{};
  bool held_ = false;
};

}  // namespace xlarank
