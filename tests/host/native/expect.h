// What a C++ test says when it fails, and random numbers that are the same everywhere.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Ends the program with the place and the words (as printf) of an expectation that doesn't hold.
#define EXPECT(holds, ...)                              \
  do {                                                  \
    if (!(holds)) {                                     \
      std::fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); \
      std::fprintf(stderr, __VA_ARGS__);                \
      std::fprintf(stderr, "\n");                       \
      std::exit(1);                                     \
    }                                                   \
  } while (false)

// xorshift64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435769u + 88172645463325252u) {}

  int64_t below(int64_t end) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<int64_t>((state_ >> 11) % static_cast<uint64_t>(end));
  }

  float real() { return static_cast<float>(below(1 << 20)) / (1 << 19) - 1; }

 private:
  uint64_t state_;
};
