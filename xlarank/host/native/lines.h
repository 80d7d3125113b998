// The cache lines of a row of a table. Included in files built with the flags of an instruction set: nothing here
// is of the standard library, and all of it is inlined.
#pragma once

#include <cstdint>

namespace xlarank {

constexpr int64_t kLineBytes = 64;

// Calls visit(address) for the lines of num_lines * 64 bytes, in order: the memory answers neighbours faster so.
template <int num_lines, class Visit>
inline __attribute__((always_inline)) void for_lines(const uint8_t* first, const Visit& visit) {
  _Pragma("GCC unroll 8") for (int line = 0; line < num_lines; ++line) visit(first + line * kLineBytes);
}

// Calls visit(address) with an address in every line of `bytes` bytes from `first` on, wherever `first` lies in its
// line. Up to eight lines without a loop: what one adds to each row keeps loads of later rows out of the core's
// window.
template <class Visit>
inline __attribute__((always_inline)) void for_each_line(const uint8_t* first, int64_t bytes, const Visit& visit) {
  const uint8_t* const last = first + bytes - 1;
  for (; bytes > 8 * kLineBytes; first += 8 * kLineBytes, bytes -= 8 * kLineBytes) for_lines<8>(first, visit);
  switch ((bytes + kLineBytes - 1) / kLineBytes) {
    case 8:
      for_lines<8>(first, visit);
      break;
    case 7:
      for_lines<7>(first, visit);
      break;
    case 6:
      for_lines<6>(first, visit);
      break;
    case 5:
      for_lines<5>(first, visit);
      break;
    case 4:
      for_lines<4>(first, visit);
      break;
    case 3:
      for_lines<3>(first, visit);
      break;
    case 2:
      for_lines<2>(first, visit);
      break;
    default:
      for_lines<1>(first, visit);
  }
  if (bytes % kLineBytes) visit(last);  // of a row that doesn't begin on a line
}

}  // namespace xlarank
