// Which rows the kernel prefetches, and when: it is compiled here once more, with a prefetch that says so.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

std::vector<const uint8_t*> prefetched;

void note(const uint8_t* line) { prefetched.push_back(line); }

}  // namespace

#define XLARANK_PREFETCH note
#define XLARANK_ISA kNoting
#define XLARANK_LANES 4
#include "pool_kernel.inc"

#include "plain_rows.h"

namespace xlarank {
namespace {

constexpr int64_t kRows = 9, kNumRead = 20, kIdsABag = 2, kSplit = 6;

// Rows in the order in which their lines came.
std::vector<int32_t> rows_of(const PlainTable& table) {
  std::vector<int32_t> rows;
  for (const uint8_t* line : prefetched) {
    const int32_t row = static_cast<int32_t>((line - table.bytes()) / table.row_bytes());
    if (rows.empty() || rows.back() != row) rows.push_back(row);
  }
  return rows;
}

void expect_first(const PlainTable& table, const std::vector<int32_t>& rows, int64_t count, int64_t ahead) {
  const std::vector<int32_t> expected(rows.begin(), rows.begin() + count);
  EXPECT(rows_of(table) == expected, "dim %d, %d rows ahead: expected the first %d rows to be prefetched, got %zu",
         static_cast<int>(table.dim), static_cast<int>(ahead), static_cast<int>(count), rows_of(table).size());
}

// Half of the rows that were read have so many more behind them on their way.
void test_distance(int64_t dim, int64_t ahead) {
  const PlainTable table(RowFormat::kFloat32, kRows, dim, 1);
  std::vector<int32_t> rows;  // no two alike in a row
  for (int64_t i = 0; i < kNumRead; ++i) rows.push_back(static_cast<int32_t>(i * 4 % kRows));
  std::vector<int64_t> bounds;
  for (int64_t id = 0; id <= kNumRead; id += kIdsABag) bounds.push_back(id);
  std::vector<float> out(static_cast<size_t>(kNumRead * dim));
  const int64_t by_then = ahead ? std::min(kNumRead, kSplit + ahead) : 0, at_end = ahead ? kNumRead : 0;

  prefetched.clear();
  const int64_t num_bags = kNumRead / kIdsABag, split = kSplit / kIdsABag;
  kNoting.pool(table.view(ahead), Bags{rows.data(), bounds.data(), split, kNumRead}, Divide::kNo, out.data(), dim);
  expect_first(table, rows, by_then, ahead);
  kNoting.pool(table.view(ahead), Bags{rows.data(), bounds.data() + split, num_bags - split, kNumRead}, Divide::kNo,
               out.data(), dim);
  expect_first(table, rows, at_end, ahead);

  prefetched.clear();
  kNoting.copy(table.view(ahead), rows.data(), kNumRead, 0, kSplit, out.data(), dim);
  expect_first(table, rows, by_then, ahead);
  kNoting.copy(table.view(ahead), rows.data(), kNumRead, kSplit, kNumRead, out.data(), dim);
  expect_first(table, rows, at_end, ahead);
}

}  // namespace
}  // namespace xlarank

int main() {
  for (const int64_t dim : {13, 16}) {  // rows of any size, and of one that the kernel is specialised for
    for (const int64_t ahead : {0, 1, 5, 1000}) xlarank::test_distance(dim, ahead);
  }
}
