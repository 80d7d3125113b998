#include "gather.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "preprocess.h"

namespace xlarank {
namespace {

// A task, in lines touched: large enough to pay for its prologue, small enough to balance the threads.
constexpr int64_t kMinTaskLines = 512;
constexpr int64_t kMaxTaskLines = 16384;
constexpr int64_t kTasksAThread = 8;
// Less than this in all is done before a helper would have woken up.
constexpr int64_t kInlineLines = 2048;
constexpr int64_t kDenseBlockRows = 32;
// Rows bound for bfloat16 are gathered so many floats at a time and then rounded. Row by row, the arithmetic
// fills the core's window and leaves few loads of later rows in flight: measured 3x slower for an id a row.
// Sizes from 1024 to 16384 can't be told apart.
constexpr int64_t kBlockFloats = 4096;

// Rows [begin, end) of a batch for one lookup feature, or for all dense features of a scope.
struct Task {
  const Feature* feature;  // null: the dense features
  Scope scope;
  int64_t begin;
  int64_t end;
  int64_t lines;  // touched, about
};

// Reused by every task of a thread.
struct Scratch {
  std::vector<int32_t> rows;
  std::vector<int64_t> bounds;
  std::vector<float> floats;
  Repeats repeats;
};

int64_t lines_of(int64_t bytes) { return bytes / kLineBytes + 1; }

class Batch {
 public:
  Batch(const Plan& plan, const IsaFunctions& isa, RepeatWatch& watch, const std::vector<Segment>& segments,
        int64_t num_rows, int64_t num_requests, const std::vector<uint8_t*>& leaves)
      : plan_(plan), isa_(isa), watch_(watch), segments_(segments), leaves_(leaves), sizes_{num_requests, num_rows} {
    starts_.reserve(segments.size() + 1);
    starts_.push_back(0);
    for (const Segment& segment : segments) starts_.push_back(starts_.back() + segment.end - segment.begin);
  }

  int64_t fill(ThreadPool& threads) {
    std::vector<Task> tasks;
    const int64_t lines = plan_tasks(threads.num_threads(), tasks);
    run(threads, lines, tasks, [this](const Task& task) { do_task(task); });
    write_request_of_row();
    pad(threads);
    return bad_feature_.load(std::memory_order_relaxed);
  }

 private:
  int64_t valid_rows(Scope scope) const {
    return scope == Scope::kContext ? static_cast<int64_t>(segments_.size()) : starts_.back();
  }

  template <class Item, class Body>
  static void run(ThreadPool& threads, int64_t lines, const std::vector<Item>& items, const Body& body) {
    const int64_t count = static_cast<int64_t>(items.size());
    if (lines < kInlineLines) {
      for (const Item& item : items) body(item);
    } else {
      threads.run(count, [&](int64_t i) { body(items[static_cast<size_t>(i)]); });
    }
  }

  // Calls body(column, first, last, row) for the parts of batch rows [begin, end) that lie in one request:
  // rows [first, last) of the feature's column belong at batch row `row`.
  template <class Body>
  void for_each_part(const Feature& feature, int64_t begin, int64_t end, const Body& body) const {
    const size_t index = static_cast<size_t>(&feature - plan_.features.data());
    if (feature.scope == Scope::kContext) {
      for (int64_t s = begin; s < end; ++s) {
        body(segments_[static_cast<size_t>(s)].request->columns[index], int64_t{0}, int64_t{1}, s);
      }
      return;
    }
    size_t s = static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin()) - 1;
    for (int64_t row = begin; row < end; ++s) {
      const int64_t first = segments_[s].begin + row - starts_[s];
      const int64_t count = std::min(end, starts_[s + 1]) - row;
      body(segments_[s].request->columns[index], first, first + count, row);
      row += count;
    }
  }

  // Appends all tasks, the longest first; returns the lines that they touch, about.
  int64_t plan_tasks(int num_threads, std::vector<Task>& tasks) const {
    std::vector<Task> wholes;  // one a feature
    int64_t total = 0;
    for (const Scope scope : {Scope::kContext, Scope::kCandidate}) {
      const int64_t rows = valid_rows(scope);
      int64_t dense_width = 0;
      for (const Feature& feature : plan_.features) {
        if (feature.scope != scope || feature.leaf < 0) continue;
        if (feature.kind == Kind::kDense) {
          dense_width += feature.width;
          continue;
        }
        wholes.push_back(Task{&feature, scope, 0, rows, lookup_lines(feature, rows)});
      }
      if (dense_width) wholes.push_back(Task{nullptr, scope, 0, rows, rows * lines_of(dense_width * 8)});
    }
    for (const Task& whole : wholes) total += whole.lines;
    const int64_t target = std::clamp(total / (num_threads * kTasksAThread), kMinTaskLines, kMaxTaskLines);
    for (const Task& whole : wholes) {
      const int64_t parts = std::clamp<int64_t>((whole.lines + target - 1) / target, 1, whole.end);
      for (int64_t part = 0; part < parts; ++part) {
        tasks.push_back(Task{whole.feature, whole.scope, whole.end * part / parts, whole.end * (part + 1) / parts,
                             whole.lines / parts});
      }
    }
    const auto longer = [](const Task& a, const Task& b) { return a.lines > b.lines; };
    std::stable_sort(tasks.begin(), tasks.end(), longer);
    return total;
  }

  int64_t lookup_lines(const Feature& feature, int64_t rows) const {
    int64_t num_ids = 0;
    for_each_part(feature, 0, rows, [&](const Column& column, int64_t first, int64_t last, int64_t) {
      num_ids += column.bags.empty()
                     ? last - first
                     : column.bags[static_cast<size_t>(last)] - column.bags[static_cast<size_t>(first)];
    });
    if (feature.max_length) num_ids = std::min(num_ids, rows * feature.max_length);
    const TableView& view = table_of(feature).view;
    const int64_t written = feature.kind == Kind::kSequence ? feature.max_length : 1;
    return num_ids * lines_of(view.row_bytes) + rows * written * lines_of(view.dim * 4);
  }

  void do_task(const Task& task) {
    thread_local Scratch scratch;
    if (!task.feature) {
      write_dense_rows(task, scratch);
      return;
    }
    switch (task.feature->kind) {
      case Kind::kId:
        look_up_ids(task, scratch);
        break;
      case Kind::kIdList:
        pool_bags(task, scratch);
        break;
      case Kind::kSequence:
        copy_sequences(task, scratch);
        break;
      case Kind::kDense:
        break;
    }
  }

  // Writes rows [begin, end) of a feature, `width` floats each. write(first, last, out, stride) is called for
  // blocks of them in order and writes floats, `stride` of them from row to row: all at once to their place in
  // the leaf or, if that is bfloat16, a block at a time to the scratch.
  template <class Write>
  void write_floats(const Feature& feature, int64_t begin, int64_t end, int64_t width, Scratch& scratch,
                    const Write& write) const {
    const Leaf& leaf = plan_.leaves[static_cast<size_t>(feature.leaf)];
    uint8_t* const column = leaves_[static_cast<size_t>(feature.leaf)] + feature.begin * bytes_of(leaf.dtype);
    if (leaf.dtype == Dtype::kFloat32) {
      write(begin, end, reinterpret_cast<float*>(column + begin * leaf.row_bytes), leaf.row_items);
      return;
    }
    const int64_t step = std::max<int64_t>(1, kBlockFloats / width);
    for (int64_t first = begin; first < end; first += step) {
      const int64_t last = std::min(end, first + step);
      scratch.floats.resize(static_cast<size_t>((last - first) * width));
      write(first, last, scratch.floats.data(), width);
      uint16_t* const out = reinterpret_cast<uint16_t*>(column + first * leaf.row_bytes);
      isa_.round(scratch.floats.data(), last - first, width, out, leaf.row_items);
    }
  }

  const Table& table_of(const Feature& feature) const { return plan_.tables[static_cast<size_t>(feature.table)]; }

  // In blocks of rows, so that the lines of a block stay in cache from feature to feature.
  void write_dense_rows(const Task& task, Scratch& scratch) const {
    for (int64_t begin = task.begin; begin < task.end; begin += kDenseBlockRows) {
      const int64_t end = std::min(task.end, begin + kDenseBlockRows);
      for (const Feature& feature : plan_.features) {
        if (feature.kind != Kind::kDense || feature.scope != task.scope || feature.leaf < 0) continue;
        const auto write = [&](int64_t from, int64_t to, float* out, int64_t stride) {
          for_each_part(feature, from, to, [&](const Column& column, int64_t first, int64_t last, int64_t row) {
            write_dense(feature, column, first, last, out + (row - from) * stride, stride);
          });
        };
        write_floats(feature, begin, end, feature.width, scratch, write);
      }
    }
  }

  void resolve(const Feature& feature, const Column& column, int64_t begin, int64_t end, int32_t* rows) {
    if (resolve_rows(feature, table_of(feature), column, begin, end, rows)) return;
    const int64_t index = &feature - plan_.features.data();
    int64_t seen = bad_feature_.load(std::memory_order_relaxed);
    while ((seen < 0 || index < seen) && !bad_feature_.compare_exchange_weak(seen, index)) {
    }
  }

  // Row numbers of the ids of a task's bags, truncated, into the scratch: flat, with bounds.
  void resolve_bags(const Task& task, Scratch& scratch) {
    const Feature& feature = *task.feature;
    const int64_t limit = feature.max_length ? feature.max_length : INT64_MAX;
    scratch.rows.clear();
    scratch.bounds.assign(1, 0);
    for_each_part(feature, task.begin, task.end, [&](const Column& column, int64_t first, int64_t last, int64_t) {
      const auto flush = [&](int64_t begin, int64_t end) {
        const size_t at = scratch.rows.size();
        scratch.rows.resize(at + static_cast<size_t>(end - begin));
        if (end > begin) resolve(feature, column, begin, end, scratch.rows.data() + at);
      };
      int64_t run_begin = column.bags[static_cast<size_t>(first)], run_end = run_begin;
      for (int64_t row = first; row < last; ++row) {
        const int64_t end = column.bags[static_cast<size_t>(row) + 1];
        const int64_t begin = std::max(column.bags[static_cast<size_t>(row)], end - std::min(limit, end));
        if (begin != run_end) {
          flush(run_begin, run_end);
          run_begin = begin;
        }
        run_end = end;
        scratch.bounds.push_back(scratch.bounds.back() + end - begin);
      }
      flush(run_begin, run_end);
    });
  }

  // The first ids of bag `bag` whose rows the device holds become places there, as many as the leaf takes; the host
  // reads zeros for them.
  void send_to_device(const Feature& feature, int64_t bag, int32_t* rows, int64_t num_rows) const {
    const Table& table = table_of(feature);
    const Leaf& leaf = plan_.leaves[static_cast<size_t>(feature.places_leaf)];
    int32_t* const out = reinterpret_cast<int32_t*>(leaves_[static_cast<size_t>(feature.places_leaf)] +
                                                    bag * leaf.row_bytes);
    int64_t sent = 0;
    for (int64_t i = 0; i < num_rows && sent < leaf.row_items; ++i) {
      if (rows[i] < 0) continue;
      const int32_t place = table.device_places ? table.device_places[rows[i]] : rows[i];
      if (place < 0) continue;
      // A sequence keeps its order: its places stand where its vectors do.
      if (feature.kind == Kind::kSequence) {
        while (sent < i) out[sent++] = static_cast<int32_t>(table.num_device_rows);
      }
      out[sent++] = place;
      rows[i] = -1;
    }
    std::fill(out + sent, out + leaf.row_items, static_cast<int32_t>(table.num_device_rows));
  }

  void send_bags_to_device(const Task& task, Scratch& scratch) const {
    const Feature& feature = *task.feature;
    if (feature.places_leaf < 0) return;
    for (int64_t bag = task.begin; bag < task.end; ++bag) {
      const size_t at = static_cast<size_t>(bag - task.begin);
      const int64_t begin = scratch.bounds[at], count = scratch.bounds[at + 1] - begin;
      send_to_device(feature, bag, scratch.rows.data() + begin, count);
      if (feature.divisor_leaf < 0) continue;
      float* const divisors = reinterpret_cast<float*>(leaves_[static_cast<size_t>(feature.divisor_leaf)]);
      const float ids = static_cast<float>(std::max<int64_t>(count, 1));
      divisors[bag] = feature.combiner == Combiner::kMean ? ids : std::sqrt(ids);
    }
  }

  void pool_bags(const Task& task, Scratch& scratch) {
    const Feature& feature = *task.feature;
    resolve_bags(task, scratch);
    send_bags_to_device(task, scratch);
    const int64_t num_bags = task.end - task.begin, num_kept = keep_first_of_equal(feature, num_bags, scratch);
    const TableView& table = table_of(feature).view;
    const Divide divide = feature.combiner == Combiner::kSum    ? Divide::kNo
                          : feature.combiner == Combiner::kMean ? Divide::kByCount
                                                                : Divide::kBySqrtCount;
    const auto write = [&](int64_t first, int64_t last, float* out, int64_t stride) {
      const Bags bags{scratch.rows.data(), scratch.bounds.data() + (first - task.begin), last - first,
                      static_cast<int64_t>(scratch.rows.size())};
      isa_.pool(table, bags, divide, out, stride);
    };
    write_floats(feature, task.begin, task.begin + num_kept, table.dim, scratch, write);
    if (num_kept < num_bags) spread(task, scratch.repeats.kept());
  }

  // Cuts the scratch down to bags that differ if looking for equal ones is worth it; returns how many are left.
  int64_t keep_first_of_equal(const Feature& feature, int64_t num_bags, Scratch& scratch) {
    const size_t index = static_cast<size_t>(&feature - plan_.features.data());
    const int64_t num_ids = static_cast<int64_t>(scratch.rows.size());
    if (!watch_.looks(index, num_ids, num_bags)) return num_bags;
    const int64_t num_kept = scratch.repeats.compact(scratch.rows, scratch.bounds);
    watch_.saw(index, num_ids, num_ids - static_cast<int64_t>(scratch.rows.size()));
    return num_kept;
  }

  // The first rows of a task hold the vectors of the bags that were kept: copies them to where they belong.
  // From the last row on, because none lies behind its place.
  void spread(const Task& task, const std::vector<int32_t>& kept) const {
    const Feature& feature = *task.feature;
    const Leaf& leaf = plan_.leaves[static_cast<size_t>(feature.leaf)];
    uint8_t* const first = leaves_[static_cast<size_t>(feature.leaf)] + feature.begin * bytes_of(leaf.dtype) +
                           task.begin * leaf.row_bytes;
    const size_t bytes = static_cast<size_t>(table_of(feature).view.dim * bytes_of(leaf.dtype));
    for (int64_t row = static_cast<int64_t>(kept.size()) - 1; row >= 0; --row) {
      const int64_t from = kept[static_cast<size_t>(row)];
      if (from != row) std::memcpy(first + row * leaf.row_bytes, first + from * leaf.row_bytes, bytes);
    }
  }

  void look_up_ids(const Task& task, Scratch& scratch) {
    const Feature& feature = *task.feature;
    scratch.rows.resize(static_cast<size_t>(task.end - task.begin));
    for_each_part(feature, task.begin, task.end, [&](const Column& column, int64_t first, int64_t last, int64_t row) {
      resolve(feature, column, first, last, scratch.rows.data() + (row - task.begin));
    });
    if (feature.places_leaf >= 0) {
      for (int64_t row = task.begin; row < task.end; ++row) {
        send_to_device(feature, row, scratch.rows.data() + (row - task.begin), 1);
      }
    }
    const TableView& table = table_of(feature).view;
    const auto write = [&](int64_t first, int64_t last, float* out, int64_t stride) {
      isa_.copy(table, scratch.rows.data(), task.end - task.begin, first - task.begin, last - task.begin, out, stride);
    };
    write_floats(feature, task.begin, task.end, table.dim, scratch, write);
  }

  void copy_sequences(const Task& task, Scratch& scratch) {
    const Feature& feature = *task.feature;
    resolve_bags(task, scratch);
    send_bags_to_device(task, scratch);
    const TableView& table = table_of(feature).view;
    const int64_t length = feature.max_length, num_ids = static_cast<int64_t>(scratch.rows.size());
    uint8_t* mask = leaves_[static_cast<size_t>(feature.leaf) + 1] + task.begin * length;
    const auto write = [&](int64_t first, int64_t last, float* out, int64_t stride) {
      for (int64_t row = first; row < last; ++row, out += stride, mask += length) {
        const size_t bag = static_cast<size_t>(row - task.begin);
        const int64_t begin = scratch.bounds[bag], end = scratch.bounds[bag + 1], count = end - begin;
        isa_.copy(table, scratch.rows.data(), num_ids, begin, end, out, table.dim);
        std::memset(out + count * table.dim, 0, static_cast<size_t>((length - count) * table.dim) * sizeof(float));
        std::memset(mask, 1, static_cast<size_t>(count));
        std::memset(mask + count, 0, static_cast<size_t>(length - count));
      }
    };
    write_floats(feature, task.begin, task.end, length * table.dim, scratch, write);
  }

  void write_request_of_row() const {
    int32_t* const out = reinterpret_cast<int32_t*>(leaves_.back());
    for (size_t s = 0; s < segments_.size(); ++s) {
      std::fill(out + starts_[s], out + starts_[s + 1], static_cast<int32_t>(s));
    }
  }

  // Repeats the last valid row of each leaf to its end.
  void pad(ThreadPool& threads) const {
    struct Rows {
      size_t leaf;
      int64_t begin;
      int64_t end;
    };
    std::vector<Rows> parts;
    int64_t lines = 0;
    for (size_t leaf = 0; leaf < plan_.leaves.size(); ++leaf) {
      const int64_t row_lines = lines_of(plan_.leaves[leaf].row_bytes);
      const int64_t end = sizes_[static_cast<size_t>(plan_.leaves[leaf].scope)];
      const int64_t step = std::max<int64_t>(1, kMinTaskLines / row_lines);
      for (int64_t begin = valid_rows(plan_.leaves[leaf].scope); begin < end; begin += step) {
        parts.push_back(Rows{leaf, begin, std::min(end, begin + step)});
        lines += (parts.back().end - begin) * row_lines;
      }
    }
    run(threads, lines, parts, [this](const Rows& rows) {
      const Leaf& leaf = plan_.leaves[rows.leaf];
      const size_t bytes = static_cast<size_t>(leaf.row_bytes);
      const uint8_t* const last = leaves_[rows.leaf] + (valid_rows(leaf.scope) - 1) * leaf.row_bytes;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        std::memcpy(leaves_[rows.leaf] + row * leaf.row_bytes, last, bytes);
      }
    });
  }

  const Plan& plan_;
  const IsaFunctions& isa_;
  RepeatWatch& watch_;
  const std::vector<Segment>& segments_;
  const std::vector<uint8_t*>& leaves_;
  const int64_t sizes_[2];  // rows of the bucket by scope: Q, B
  std::vector<int64_t> starts_;  // first batch row of each segment, then their total
  std::atomic<int64_t> bad_feature_{-1};
};

}  // namespace

int64_t gather(const Plan& plan, const IsaFunctions& isa, ThreadPool& threads, RepeatWatch& watch,
               const std::vector<Segment>& segments, int64_t num_rows, int64_t num_requests,
               const std::vector<uint8_t*>& leaves) {
  return Batch(plan, isa, watch, segments, num_rows, num_requests, leaves).fill(threads);
}

}  // namespace xlarank
