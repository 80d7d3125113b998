// XXH64 as published: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
// Row numbers of trained tables depend on it, so it never changes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace xlarank {

// Unaligned little-endian load: wire buffers start at any byte.
template <class T>
inline T load(const void* address) {
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

namespace xxh {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ull;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Full;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9ull;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63ull;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5ull;

inline uint64_t rotl(uint64_t value, int by) { return (value << by) | (value >> (64 - by)); }
inline uint64_t round(uint64_t lane, uint64_t word) { return rotl(lane + word * kPrime2, 31) * kPrime1; }
inline uint64_t merge(uint64_t state, uint64_t lane) { return (state ^ round(0, lane)) * kPrime1 + kPrime4; }
inline uint64_t mix8(uint64_t state, uint64_t word) {
  return rotl(state ^ round(0, word), 27) * kPrime1 + kPrime4;
}
inline uint64_t finish(uint64_t state) {
  state = (state ^ (state >> 33)) * kPrime2;
  state = (state ^ (state >> 29)) * kPrime3;
  return state ^ (state >> 32);
}

}  // namespace xxh

// XXH64 of `size` bytes.
inline uint64_t hash_bytes(const uint8_t* data, size_t size, uint64_t seed) {
  using namespace xxh;
  const uint8_t* const end = data + size;
  uint64_t state;
  if (size >= 32) {
    uint64_t a = seed + kPrime1 + kPrime2, b = seed + kPrime2, c = seed, d = seed - kPrime1;
    for (; end - data >= 32; data += 32) {
      a = round(a, load<uint64_t>(data));
      b = round(b, load<uint64_t>(data + 8));
      c = round(c, load<uint64_t>(data + 16));
      d = round(d, load<uint64_t>(data + 24));
    }
    state = rotl(a, 1) + rotl(b, 7) + rotl(c, 12) + rotl(d, 18);
    state = merge(merge(merge(merge(state, a), b), c), d);
  } else {
    state = seed + kPrime5;
  }
  state += size;
  for (; end - data >= 8; data += 8) state = mix8(state, load<uint64_t>(data));
  if (end - data >= 4) {
    state = rotl(state ^ (load<uint32_t>(data) * kPrime1), 23) * kPrime2 + kPrime3;
    data += 4;
  }
  for (; data < end; ++data) state = rotl(state ^ (*data * kPrime5), 11) * kPrime1;
  return finish(state);
}

// XXH64 of an integer's 8 bytes, little-endian.
inline uint64_t hash_int64(int64_t value, uint64_t seed) {
  return xxh::finish(xxh::mix8(seed + xxh::kPrime5 + 8, static_cast<uint64_t>(value)));
}

}  // namespace xlarank
