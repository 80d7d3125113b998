// Tables whose decoded values are known, in every format: encoded a value at a time, without the kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "expect.h"
#include "pool.h"

namespace xlarank {

constexpr RowFormat kFormats[] = {RowFormat::kFloat32, RowFormat::kFloat16, RowFormat::kBfloat16, RowFormat::kInt8,
                                  RowFormat::kInt4};

// A float16 as float, by arithmetic.
inline float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                              : std::ldexp(static_cast<float>(fraction), -24);
  return bits & 0x8000 ? -size : size;
}

// Zeros that begin on a cache line.
inline std::shared_ptr<uint8_t> bytes_on_a_line(int64_t count) {
  const std::align_val_t line{static_cast<size_t>(kLineBytes)};
  void* const memory = ::operator new(static_cast<size_t>(count), line);
  std::memset(memory, 0, static_cast<size_t>(count));
  return {static_cast<uint8_t*>(memory), [line](uint8_t* owned) { ::operator delete(owned, line); }};
}

// Encoded bytes that end where their memory does (a read past them is a fault under AddressSanitizer) and values.
struct PlainTable {
  RowFormat format;
  int64_t num_rows;
  int64_t dim;
  int64_t begin;  // of the first row behind a cache line
  std::shared_ptr<uint8_t> memory;
  std::vector<float> values;  // [num_rows, dim], decoded

  PlainTable(RowFormat of_format, int64_t rows, int64_t of_dim, uint64_t seed, int64_t begins_at = 0)
      : format(of_format), num_rows(rows), dim(of_dim), begin(begins_at),
        memory(bytes_on_a_line(begins_at + rows * row_bytes())) {
    Random random(seed);
    for (int64_t row = 0; row < rows; ++row) fill(random, bytes() + row * row_bytes());
  }

  uint8_t* bytes() const { return memory.get() + begin; }
  int64_t row_bytes() const { return encoded_bytes(format, dim); }
  TableView view(int64_t ahead = 3) const {
    return TableView{bytes(), format, row_bytes(), dim, ahead};
  }
  const float* row(int64_t index) const { return values.data() + index * dim; }

 private:
  void fill(Random& random, uint8_t* row) {
    const float scale = random.real(), bias = random.real();
    const bool affine = format == RowFormat::kInt8 || format == RowFormat::kInt4;
    if (affine) {
      std::memcpy(row, &scale, 4);
      std::memcpy(row + 4, &bias, 4);
    }
    for (int64_t k = 0; k < dim; ++k) values.push_back(put(random, row, k, scale, bias));
  }

  // Writes value k of a row; returns what it decodes to.
  float put(Random& random, uint8_t* row, int64_t k, float scale, float bias) const {
    switch (format) {
      case RowFormat::kFloat32: {
        const float value = random.real();
        std::memcpy(row + 4 * k, &value, 4);
        return value;
      }
      case RowFormat::kFloat16: {
        const uint16_t bits = static_cast<uint16_t>(random.below(0x7C00) | random.below(2) << 15);
        std::memcpy(row + 2 * k, &bits, 2);
        return half_value(bits);
      }
      case RowFormat::kBfloat16: {
        const float value = random.real();
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const uint16_t upper = static_cast<uint16_t>(bits >> 16);
        std::memcpy(row + 2 * k, &upper, 2);
        bits &= 0xFFFF0000;
        float rounded;
        std::memcpy(&rounded, &bits, 4);
        return rounded;
      }
      case RowFormat::kInt8:
        row[8 + k] = static_cast<uint8_t>(random.below(256));
        return static_cast<float>(row[8 + k]) * scale + bias;
      case RowFormat::kInt4: {
        const uint8_t q = static_cast<uint8_t>(random.below(16));
        row[8 + k / 2] = static_cast<uint8_t>(row[8 + k / 2] | (k % 2 ? q << 4 : q));
        return static_cast<float>(q) * scale + bias;
      }
    }
    return 0;
  }
};

inline bool same_bits(const float* a, const float* b, int64_t count) {
  return !std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float));
}

}  // namespace xlarank
