// Pooling and copying of every format and instruction set against plain loops, by bits.
#include <cmath>
#include <memory>
#include <vector>

#include "ceiling.h"
#include "plain_rows.h"

namespace xlarank {
namespace {

constexpr int64_t kDims[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 260};
constexpr int64_t kAheads[] = {0, 1, 5, 1000};
constexpr int64_t kRows = 9;

struct Flat {
  std::vector<int32_t> rows;
  std::vector<int64_t> bounds{0};
};

// Bags of which some are empty, of rows of which some are -1.
Flat random_bags(Random& random, int64_t num_bags) {
  Flat flat;
  for (int64_t bag = 0; bag < num_bags; ++bag) {
    for (int64_t left = random.below(3) ? random.below(6) : 0; left > 0; --left) {
      flat.rows.push_back(static_cast<int32_t>(random.below(kRows + 1) - 1));
    }
    flat.bounds.push_back(static_cast<int64_t>(flat.rows.size()));
  }
  return flat;
}

std::vector<float> plain_pool(const PlainTable& table, const Flat& flat, size_t bag, Divide divide) {
  std::vector<float> sum(static_cast<size_t>(table.dim), 0.0f);
  const int64_t begin = flat.bounds[bag], end = flat.bounds[bag + 1];
  for (int64_t i = begin; i < end; ++i) {
    const int32_t row = flat.rows[static_cast<size_t>(i)];
    for (int64_t k = 0; row >= 0 && k < table.dim; ++k) sum[static_cast<size_t>(k)] += table.row(row)[k];
  }
  const float count = static_cast<float>(end - begin);
  for (float& value : sum) {
    if (end > begin && divide == Divide::kByCount) value /= count;
    if (end > begin && divide == Divide::kBySqrtCount) value /= std::sqrt(count);
  }
  return sum;
}

void test_pool(const char* isa, const IsaFunctions& functions, const PlainTable& table, int64_t ahead, uint64_t seed) {
  Random random(seed);
  const Flat flat = random_bags(random, 12);
  const Divide divide = static_cast<Divide>(random.below(3));
  const int64_t stride = table.dim + random.below(3);
  std::vector<float> out(static_cast<size_t>(11 * stride + table.dim), -7.0f);
  // In two blocks, as the gather does for a leaf of bfloat16.
  const int64_t num_rows = static_cast<int64_t>(flat.rows.size()), split = random.below(12);
  functions.pool(table.view(ahead), Bags{flat.rows.data(), flat.bounds.data(), split, num_rows}, divide, out.data(),
                 stride);
  functions.pool(table.view(ahead), Bags{flat.rows.data(), flat.bounds.data() + split, 12 - split, num_rows}, divide,
                 out.data() + split * stride, stride);
  for (int64_t bag = 0; bag < 12; ++bag) {
    const std::vector<float> expected = plain_pool(table, flat, static_cast<size_t>(bag), divide);
    EXPECT(same_bits(out.data() + bag * stride, expected.data(), table.dim), "%s: pool, format %d, dim %d, bag %d",
           isa, static_cast<int>(table.format), static_cast<int>(table.dim), static_cast<int>(bag));
    for (int64_t k = table.dim; bag < 11 && k < stride; ++k) {
      EXPECT(out[static_cast<size_t>(bag * stride + k)] == -7.0f, "%s: pool wrote between vectors", isa);
    }
  }
}

void test_copy(const char* isa, const IsaFunctions& functions, const PlainTable& table, int64_t ahead) {
  std::vector<int32_t> rows;
  for (int64_t row = -1; row < kRows; ++row) rows.push_back(static_cast<int32_t>(row));
  const int64_t count = static_cast<int64_t>(rows.size());
  std::vector<float> out(static_cast<size_t>(count * table.dim), -7.0f);
  functions.copy(table.view(ahead), rows.data(), count, 0, 4, out.data(), table.dim);
  functions.copy(table.view(ahead), rows.data(), count, 4, count, out.data() + 4 * table.dim, table.dim);
  std::vector<float> expected(static_cast<size_t>(table.dim), 0.0f);
  expected.insert(expected.end(), table.values.begin(), table.values.end());
  EXPECT(same_bits(out.data(), expected.data(), count * table.dim), "%s: copy, format %d, dim %d", isa,
         static_cast<int>(table.format), static_cast<int>(table.dim));
}

// Every float16 there is but NaN, infinity by hand.
void test_halves(const char* isa, const IsaFunctions& functions) {
  std::vector<uint16_t> bits(1 << 16);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  for (const int64_t dim : {1, 4, 8, 16}) {
    std::vector<int32_t> rows(bits.size() / static_cast<size_t>(dim));
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i);
    const TableView view{reinterpret_cast<const uint8_t*>(bits.data()), RowFormat::kFloat16, 2 * dim, dim, 0};
    std::vector<float> out(bits.size());
    const int64_t count = static_cast<int64_t>(rows.size());
    functions.copy(view, rows.data(), count, 0, count, out.data(), dim);
    for (size_t i = 0; i < bits.size(); ++i) {
      const bool special = (bits[i] & 0x7C00) == 0x7C00;
      if (special && bits[i] & 0x3FF) {
        EXPECT(std::isnan(out[i]), "%s: float16 %zx isn't NaN", isa, i);
        continue;
      }
      const float expected = !special ? half_value(bits[i]) : bits[i] & 0x8000 ? -INFINITY : INFINITY;
      EXPECT(same_bits(&out[i], &expected, 1), "%s: float16 %zx is %g, not %g", isa, i, static_cast<double>(out[i]),
             static_cast<double>(expected));
    }
  }
}

void test_ahead() {
  EXPECT(rows_ahead(0, 64) == 0 && rows_ahead(1, 64) == 1 && rows_ahead(32, 64) == 32, "lines of 64 bytes");
  EXPECT(rows_ahead(1, 256) == 1 && rows_ahead(32, 256) == 8 && rows_ahead(32, 72) == 16, "lines of rows");
}

void test_read_rows() {
  const std::vector<uint8_t> bytes{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18};
  const std::vector<int32_t> rows{1, 0};
  for (const int64_t ahead : {0, 1, 7}) {
    const TableView view{bytes.data(), RowFormat::kInt8, 9, 1, ahead};
    EXPECT(read_rows(view, rows.data(), 2) == 10 + 18 + 1 + 9, "read_rows");
  }
  // Whole lines, of each number of them that is known and one that isn't: every line's first byte is its number.
  for (const int64_t lines : {1, 2, 3, 4, 8}) {
    const std::shared_ptr<uint8_t> memory = bytes_on_a_line(3 * lines * kLineBytes);
    for (int64_t line = 0; line < 3 * lines; ++line) memory.get()[line * kLineBytes] = static_cast<uint8_t>(line);
    const std::vector<int32_t> twice{2, 0, 2};
    const int64_t sum = 2 * (lines * 2 * lines + lines * (lines - 1) / 2) + lines * (lines - 1) / 2;
    for (const int64_t ahead : {0, 1, 7}) {
      const TableView view{memory.get(), RowFormat::kFloat32, lines * kLineBytes, lines * 16, ahead};
      EXPECT(read_rows(view, twice.data(), 3) == static_cast<uint64_t>(sum), "read_rows of %d lines",
             static_cast<int>(lines));
    }
  }
}

}  // namespace
}  // namespace xlarank

int main() {
  using namespace xlarank;
  test_ahead();
  test_read_rows();
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    const IsaFunctions* const functions = isa_functions(isa);
    if (!functions) {
      std::printf("%s: not of this CPU\n", isa);
      continue;
    }
    uint64_t seed = 1;
    for (const RowFormat format : kFormats) {
      for (const int64_t dim : kDims) {
        for (const int64_t begin : {0, 16}) {  // rows of known size begin on a line, or are of any size
          const PlainTable table(format, kRows, dim, ++seed, begin);
          for (const int64_t ahead : kAheads) {
            test_pool(isa, *functions, table, ahead, ++seed);
            test_copy(isa, *functions, table, ahead);
          }
        }
      }
    }
    test_halves(isa, *functions);
    std::printf("%s: ok\n", isa);
  }
}
