// A reader meets a writer that lost its core in the middle of a row: it gives its own away and sums what was written.
//
// One thread plays both: this file's sched_yield stands before the library's and is when the writer runs.
#include "stamps.h"

#include <sched.h>

#include <vector>

#include "expect.h"
#include "pool.h"

namespace xlarank {
namespace {

constexpr int64_t kDim = 8;
constexpr int32_t kRow = 3;
constexpr int kYieldsUntilWritten = 3;

int num_yields = 0;
void (*on_yield)() = nullptr;

std::vector<uint32_t> stamps(kNumStamps);
std::vector<float> table(5 * kDim, 1.0f);

// The second half of a write, when the writer got a core for the third time.
void finish_write() {
  if (num_yields != kYieldsUntilWritten) return;
  for (int64_t d = 0; d < kDim; ++d) table[kRow * kDim + d] = 7.0f;
  ++stamps[stamp_of(kRow)];
}

void begin_write() {
  num_yields = 0;
  on_yield = finish_write;
  ++stamps[stamp_of(kRow)];
  table[kRow * kDim] = 7.0f;
}

TableView view() {
  return {reinterpret_cast<const uint8_t*>(table.data()), RowFormat::kFloat32, 4 * kDim, kDim, 0, stamps.data()};
}

void test_stamps_that_are_even_cost_no_yield() {
  const int32_t rows[] = {0, kRow, -1};
  num_yields = 0;
  const uint64_t sum = stamps_before(stamps.data(), rows, 3);
  EXPECT(stamps_after(stamps.data(), rows, 3) == sum, "nothing was written");
  EXPECT(num_yields == 0, "%d yields", num_yields);
}

void test_a_reader_yields_until_the_row_is_written() {
  begin_write();
  const uint32_t odd = stamps[stamp_of(kRow)];
  EXPECT(wait_until_written(&stamps[stamp_of(kRow)]) == odd + 1, "the stamp after the write");
  EXPECT(num_yields == kYieldsUntilWritten, "%d yields", num_yields);
}

void test_every_instruction_set_sums_and_copies_what_was_written() {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    const IsaFunctions* functions = isa_functions(isa);
    if (!functions) continue;
    const int32_t rows[] = {1, kRow};
    const int64_t bounds[] = {0, 2};
    float out[2 * kDim];

    table.assign(table.size(), 1.0f);
    begin_write();
    functions->pool(view(), {rows, bounds, 1, 2}, Divide::kNo, out, kDim);
    EXPECT(num_yields == kYieldsUntilWritten, "%s: %d yields", isa, num_yields);
    for (int64_t d = 0; d < kDim; ++d) EXPECT(out[d] == 8.0f, "%s: sum %f", isa, static_cast<double>(out[d]));

    table.assign(table.size(), 1.0f);
    begin_write();
    functions->copy(view(), rows, 2, 0, 2, out, kDim);
    EXPECT(num_yields == kYieldsUntilWritten, "%s: %d yields", isa, num_yields);
    for (int64_t d = 0; d < kDim; ++d) EXPECT(out[kDim + d] == 7.0f, "%s: row %f", isa, static_cast<double>(out[kDim + d]));
  }
}

}  // namespace
}  // namespace xlarank

extern "C" int sched_yield() noexcept {
  ++xlarank::num_yields;
  if (xlarank::on_yield) xlarank::on_yield();
  return 0;
}

int main() {
  xlarank::test_stamps_that_are_even_cost_no_yield();
  xlarank::test_a_reader_yields_until_the_row_is_written();
  xlarank::test_every_instruction_set_sums_and_copies_what_was_written();
}
