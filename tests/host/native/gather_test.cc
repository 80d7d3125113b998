// Whole batches against plain loops: every format, policy and kind of lookup, odd bags, threads, both outputs.
#include "gather.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "hashing.h"
#include "plain_rows.h"

namespace xlarank {
namespace {

constexpr int64_t kRows = 7, kDim = 13, kCandidates = 400, kLength = 3;
constexpr int64_t kPadded = kCandidates + 5;
constexpr int64_t kExtremes[] = {-1, kRows, INT64_MIN, INT64_MAX, int64_t{1} << 32};

// Row that an id reads; -1 for zeros. `bad` tells of an id out of range under policy error.
int64_t row_of(int64_t id, OutOfRange policy, bool& bad) {
  if (id >= 0 && id < kRows) return id;
  switch (policy) {
    case OutOfRange::kError:
      bad = true;
      return -1;
    case OutOfRange::kZero:
      return -1;
    case OutOfRange::kClip:
      return id < 0 ? 0 : kRows - 1;
    case OutOfRange::kHash:
      return static_cast<int64_t>(hash_int64(id, 0) % kRows);
  }
  return -1;
}

struct Ids {
  std::vector<int64_t> values;
  std::vector<int64_t> bags{0};
};

Ids random_ids(Random& random, bool ragged) {
  Ids ids;
  for (int64_t row = 0; row < kCandidates; ++row) {
    // Long bags over few rows: some are equal, and some are empty.
    const int64_t count = !ragged ? 1 : random.below(4) ? 11 + random.below(3) : 0;
    const bool plain = random.below(2);
    for (int64_t i = 0; i < count; ++i) {
      ids.values.push_back(plain ? 1 : random.below(9) ? random.below(kRows) : kExtremes[random.below(5)]);
    }
    ids.bags.push_back(static_cast<int64_t>(ids.values.size()));
  }
  return ids;
}

Feature lookup_feature(Kind kind, int64_t leaf, int64_t begin) {
  Feature feature{};
  feature.kind = kind;
  feature.scope = Scope::kCandidate;
  feature.type = ValueType::kInt64;
  feature.table = 0;
  feature.leaf = leaf;
  feature.begin = begin;
  feature.max_length = kind == Kind::kSequence ? kLength : 0;
  return feature;
}

Column column_of(const Ids& ids, bool ragged) {
  Column column;
  column.num_rows = kCandidates;
  column.num_values = static_cast<int64_t>(ids.values.size());
  column.integers = ids.values.data();
  if (ragged) column.bags = ids.bags;
  return column;
}

// A model of one table, read as a bag, an id and a sequence, and a request of it.
struct Case {
  PlainTable table;
  OutOfRange policy;
  bool rounds;  // bfloat16 leaves
  Plan plan;
  Request request;
  Ids bag, id, sequence;
  std::vector<std::vector<uint8_t>> leaves;

  Case(RowFormat format, OutOfRange of_policy, bool to_bfloat16, uint64_t seed)
      : table(format, kRows, kDim, seed), policy(of_policy), rounds(to_bfloat16) {
    Random random(seed);
    bag = random_ids(random, true);
    id = random_ids(random, false);
    sequence = random_ids(random, true);
    plan.tables = {Table{table.view(), kRows, policy}};
    plan.features = {lookup_feature(Kind::kIdList, 0, 0), lookup_feature(Kind::kId, 0, kDim),
                     lookup_feature(Kind::kSequence, 1, 0)};
    const Dtype dtype = rounds ? Dtype::kBfloat16 : Dtype::kFloat32;
    for (const auto& [type, items] : {std::pair{dtype, 2 * kDim}, std::pair{dtype, kLength * kDim},
                                      std::pair{Dtype::kBool, kLength}, std::pair{Dtype::kInt32, int64_t{1}}}) {
      plan.leaves.push_back(Leaf{Scope::kCandidate, type, items, items * bytes_of(type)});
      leaves.emplace_back(static_cast<size_t>(kPadded * plan.leaves.back().row_bytes), uint8_t{0xFF});
    }
    request.num_candidates = kCandidates;
    request.columns = {column_of(bag, true), column_of(id, false), column_of(sequence, true)};
  }

  // What leaf `leaf` holds at an item of a row, as float.
  float at(size_t leaf, int64_t row, int64_t item) const {
    const uint8_t* const from = leaves[leaf].data() + row * plan.leaves[leaf].row_bytes;
    uint32_t bits = 0;
    if (rounds) {
      std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, from + 2 * item, 2);
    } else {
      std::memcpy(&bits, from + 4 * item, 4);
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  // Rounded as the leaf is: none of these values is NaN or near infinity.
  float stored(float value) const {
    if (!rounds) return value;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  float value_of(int64_t of_id, int64_t k, bool& bad) const {
    const int64_t row = row_of(of_id, policy, bad);
    return row < 0 ? 0.0f : table.row(row)[k];
  }

  // Feature 0, 1 or 2 that the kernel must name, or -1.
  int64_t check_row(int64_t row) const {
    const int64_t from = std::min(row, kCandidates - 1);  // padding repeats the last
    bool bad[3] = {};
    const int64_t begin = sequence.bags[static_cast<size_t>(from)], end = sequence.bags[static_cast<size_t>(from) + 1];
    const int64_t kept = std::min(kLength, end - begin);
    for (int64_t k = 0; k < kDim; ++k) {
      float sum = 0;
      for (int64_t i = bag.bags[static_cast<size_t>(from)]; i < bag.bags[static_cast<size_t>(from) + 1]; ++i) {
        sum += value_of(bag.values[static_cast<size_t>(i)], k, bad[0]);
      }
      expect(0, row, k, sum);
      expect(0, row, kDim + k, value_of(id.values[static_cast<size_t>(from)], k, bad[1]));
      for (int64_t i = 0; i < kLength; ++i) {
        const int64_t at_id = end - kept + i;
        expect(1, row, i * kDim + k, i < kept ? value_of(sequence.values[static_cast<size_t>(at_id)], k, bad[2]) : 0);
        EXPECT(leaves[2][static_cast<size_t>(row * kLength + i)] == (i < kept), "mask of row %d", static_cast<int>(row));
      }
    }
    return bad[0] ? 0 : bad[1] ? 1 : bad[2] ? 2 : -1;
  }

  void expect(size_t leaf, int64_t row, int64_t item, float value) const {
    const float expected = stored(value), got = at(leaf, row, item);
    EXPECT(same_bits(&got, &expected, 1), "format %d, policy %d: leaf %zu, row %d, item %d: expected %g, got %g",
           static_cast<int>(table.format), static_cast<int>(policy), leaf, static_cast<int>(row),
           static_cast<int>(item), static_cast<double>(expected), static_cast<double>(got));
  }
};

int64_t gather_case(Case& batch, const IsaFunctions& isa, int num_threads) {
  ThreadPool threads(num_threads);
  RepeatWatch watch(batch.plan.features.size());
  const std::vector<Segment> segments{{&batch.request, 0, 150}, {&batch.request, 150, 151}, {&batch.request, 151, 400}};
  std::vector<uint8_t*> leaves;
  for (std::vector<uint8_t>& leaf : batch.leaves) leaves.push_back(leaf.data());
  return gather(batch.plan, isa, threads, watch, segments, kPadded, 4, leaves);
}

void test_batch(RowFormat format, OutOfRange policy, bool rounds, int num_threads, uint64_t seed) {
  Case batch(format, policy, rounds, seed);
  const int64_t bad = gather_case(batch, *isa_functions("auto"), num_threads);
  int64_t expected = -1;
  for (int64_t row = 0; row < kPadded; ++row) {
    const int64_t named = batch.check_row(row);
    if (named >= 0 && (expected < 0 || named < expected)) expected = named;
  }
  EXPECT(bad == expected, "expected feature %d to be named, got %d", static_cast<int>(expected), static_cast<int>(bad));
}

std::atomic<int64_t> num_pooled;

void counting_pool(const TableView& table, const Bags& bags, Divide divide, float* out, int64_t stride) {
  num_pooled += bags.num_bags;
  isa_functions("auto")->pool(table, bags, divide, out, stride);
}

// Half of the bags that aren't empty are ones over and over, of three lengths: most have been there before.
void test_repeated_bags_are_pooled_once() {
  Case batch(RowFormat::kFloat32, OutOfRange::kZero, false, 1);
  IsaFunctions isa = *isa_functions("auto");
  isa.pool = counting_pool;
  gather_case(batch, isa, 1);
  EXPECT(num_pooled > 0 && num_pooled < kCandidates * 3 / 4, "expected most of %d bags to be pooled once, got %d pooled",
         static_cast<int>(kCandidates), static_cast<int>(num_pooled));
}

std::mutex meeting;
std::condition_variable came;
std::set<std::thread::id> pooling;  // guarded by meeting

// Waits until two threads are here.
void meeting_pool(const TableView& table, const Bags& bags, Divide divide, float* out, int64_t stride) {
  {
    std::unique_lock lock(meeting);
    pooling.insert(std::this_thread::get_id());
    came.notify_all();
    const bool met = came.wait_for(lock, std::chrono::seconds(60), [] { return pooling.size() > 1; });
    EXPECT(met, "expected a helper to take part within a minute");
  }
  isa_functions("auto")->pool(table, bags, divide, out, stride);
}

void test_helpers_take_part() {
  Case batch(RowFormat::kFloat32, OutOfRange::kZero, false, 1);
  IsaFunctions isa = *isa_functions("auto");
  isa.pool = meeting_pool;
  gather_case(batch, isa, 2);
  EXPECT(pooling.size() == 2, "expected two threads, got %zu", pooling.size());
}

}  // namespace
}  // namespace xlarank

int main() {
  using namespace xlarank;
  test_repeated_bags_are_pooled_once();
  test_helpers_take_part();
  uint64_t seed = 0;
  for (const RowFormat format : kFormats) {
    for (const OutOfRange policy : {OutOfRange::kError, OutOfRange::kZero, OutOfRange::kClip, OutOfRange::kHash}) {
      for (const bool rounds : {false, true}) {
        for (const int num_threads : {1, 3}) test_batch(format, policy, rounds, num_threads, ++seed);
      }
    }
  }
}
