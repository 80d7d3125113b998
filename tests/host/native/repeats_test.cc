// Equal bags: which are kept, and when looking for them stops.
#include "repeats.h"

#include <vector>

#include "expect.h"

namespace xlarank {
namespace {

void test_equal_bags_are_kept_once() {
  // [5, 6], [], [5, 6], [6, 5], [], [5], [5, 6]
  std::vector<int32_t> rows{5, 6, 5, 6, 6, 5, 5, 5, 6};
  std::vector<int64_t> bounds{0, 2, 2, 4, 6, 6, 7, 9};
  Repeats repeats;
  EXPECT(repeats.compact(rows, bounds) == 4, "number kept");
  EXPECT((rows == std::vector<int32_t>{5, 6, 6, 5, 5}), "rows kept");
  EXPECT((bounds == std::vector<int64_t>{0, 2, 2, 4, 5}), "bounds kept");
  EXPECT((repeats.kept() == std::vector<int32_t>{0, 1, 0, 2, 1, 3, 0}), "places");
}

void test_random_bags_come_back() {
  Random random(3);
  Repeats repeats;
  for (int round = 0; round < 200; ++round) {
    std::vector<std::vector<int32_t>> bags(static_cast<size_t>(random.below(40)));
    std::vector<int32_t> rows;
    std::vector<int64_t> bounds{0};
    for (std::vector<int32_t>& bag : bags) {
      for (int64_t left = random.below(4); left > 0; --left) bag.push_back(static_cast<int32_t>(random.below(3) - 1));
      rows.insert(rows.end(), bag.begin(), bag.end());
      bounds.push_back(static_cast<int64_t>(rows.size()));
    }
    const int64_t num_kept = repeats.compact(rows, bounds);
    for (size_t i = 0; i < bags.size(); ++i) {
      const size_t place = static_cast<size_t>(repeats.kept()[i]);
      EXPECT(place <= i && static_cast<int64_t>(place) < num_kept, "place of bag %zu", i);
      const std::vector<int32_t> kept(rows.begin() + bounds[place], rows.begin() + bounds[place + 1]);
      EXPECT(kept == bags[i], "bag %zu", i);
      for (size_t j = 0; j < i; ++j) {
        EXPECT((bags[i] == bags[j]) == (repeats.kept()[i] == repeats.kept()[j]), "bags %zu and %zu", i, j);
      }
    }
  }
}

void test_looking_pauses_when_it_finds_little() {
  RepeatWatch watch(2);
  EXPECT(!watch.looks(0, 799, 100), "short bags aren't worth a look");
  EXPECT(!watch.looks(0, 300, 1), "a bag alone has no equal");
  EXPECT(watch.looks(0, 2000, 100), "the first task looks");
  watch.saw(0, 2000, 249);
  for (int task = 0; task < 63; ++task) EXPECT(!watch.looks(0, 2000, 100), "task %d pauses", task);
  EXPECT(watch.looks(0, 2000, 100), "and looks again");
  watch.saw(0, 2000, 250);
  EXPECT(watch.looks(0, 2000, 100), "one in eight keeps it looking");
  EXPECT(watch.looks(1, 2000, 100), "another feature has a pause of its own");
}

}  // namespace
}  // namespace xlarank

int main() {
  xlarank::test_equal_bags_are_kept_once();
  xlarank::test_random_bags_come_back();
  xlarank::test_looking_pauses_when_it_finds_little();
}
