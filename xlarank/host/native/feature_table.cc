#include "feature_table.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "hashing.h"

namespace xlarank {
namespace {

// Probes of one block are in flight together, as in vocabulary.cc.
constexpr size_t kBlock = 16;
constexpr size_t kLine = 64;
constexpr size_t kMaxPrefetched = 8 * kLine;

constexpr size_t kCollectEvery = 32;  // rows of one update
constexpr size_t kSpare = 8;          // this part of a limit is for what isn't freed yet
constexpr size_t kStripes = 4096;
constexpr size_t kMinSlots = 1024;
constexpr size_t kMallocBytes = 16;  // what an allocation costs beside its bytes

// With a limit: at most 2 of 3 slots are live, and at 5 of 6 used the table is made anew.
constexpr size_t kLiveOf3 = 2;
constexpr size_t kUsedOf6 = 5;

// A pointer takes 48 bits; the 16 above hold the lowest of the hash, so that hardly a wrong record is looked at.
// The highest bits choose the slot.
constexpr int kTagShift = 48;
constexpr uintptr_t kPointer = (uintptr_t{1} << kTagShift) - 1;
constexpr uintptr_t kLeft = 1;  // a slot whose record is gone: the search goes on

size_t stripe_of(uint64_t hash) { return hash >> 52; }
static_assert(kStripes == size_t{1} << 12);

}  // namespace

struct FeatureTable::Node {
  Node* newer;  // guarded by write_
  Node* older;  // guarded by write_
  size_t slot;  // guarded by write_
  std::atomic<bool> visited;
  bool removed;   // hides the file's
  uint32_t time;  // when it was put in, or asked for elsewhere; in the caller's unit
  Record record;

  static size_t bytes_of(size_t payload_bytes) {
    return ((sizeof(Node) + payload_bytes + 15) & ~size_t{15}) + kMallocBytes;
  }
  size_t bytes() const { return bytes_of(record.size); }
};

struct FeatureTable::Slots {
  using Entry = std::atomic<uintptr_t>;
  struct Free {
    void operator()(Entry* entries) const { std::free(entries); }
  };

  // Of the many slots of a large limit only those that are used take memory: the system's zeros are not touched.
  explicit Slots(size_t count) : size(count), entries(static_cast<Entry*>(std::calloc(count, sizeof(Entry)))) {
    if (!entries) throw std::bad_alloc();
  }

  static Node* node_of(uintptr_t entry) { return reinterpret_cast<Node*>(entry & kPointer); }
  static uintptr_t entry_of(Node* node, uint64_t hash) {
    return reinterpret_cast<uintptr_t>(node) | (static_cast<uintptr_t>(hash) << kTagShift);
  }

  // Where the search for a hash begins. Any size will do: one of a power of two would leave up to half of a
  // limit unused.
  size_t first(uint64_t hash) const {
    __extension__ using Product = unsigned __int128;
    return static_cast<size_t>((static_cast<Product>(hash) * size) >> 64);
  }
  size_t after(size_t at) const { return at + 1 == size ? 0 : at + 1; }
  size_t before(size_t at) const { return at == 0 ? size - 1 : at - 1; }

  // First place from `at` on whose tag is that of the hash; its entry is 0 if the search ends there.
  size_t probe(size_t at, uint64_t hash, uintptr_t& entry) const {
    for (;; at = after(at)) {
      entry = entries[at].load(std::memory_order_acquire);
      if (entry == 0 || (entry != kLeft && ((entry ^ entry_of(nullptr, hash)) >> kTagShift) == 0)) return at;
    }
  }

  // An id's node and its place; nullptr if there is none. Looked at once: the slot may change behind a reader.
  Node* find(int64_t id, uint64_t hash, size_t& at) const {
    uintptr_t entry;
    for (at = first(hash);; at = after(at)) {
      at = probe(at, hash, entry);
      if (entry == 0) return nullptr;
      if (node_of(entry)->record.id == id) return node_of(entry);
    }
  }

  const size_t size;
  const std::unique_ptr<Entry[], Free> entries;
};

FeatureTable::FeatureTable(const RecordLayout& layout, size_t limit, FeatureFile file)
    : layout_(layout),
      limit_(limit),
      most_(limit - limit / kSpare),
      file_(file),
      rows_(static_cast<int64_t>(file.num_rows())),
      written_(kStripes, 0) {
  if (limit_ && !file_.empty()) throw std::invalid_argument("a file and a limit don't go together");
  size_t capacity = kMinSlots;
  if (limit_) {
    // Room for as many records as the limit can hold. It never grows; while it is made anew, of the same size,
    // the second one takes the spare part of the limit.
    const size_t a_record = kLiveOf3 * Node::bytes_of(layout_.fixed_bytes()) + 3 * sizeof(uintptr_t);
    capacity = std::max(kMinSlots, std::min(3 * most_ / a_record + 1, limit_ / kSpare / sizeof(uintptr_t)));
  }
  slots_.store(new Slots(capacity));
  slot_bytes_ = capacity * sizeof(uintptr_t);
}

FeatureTable::~FeatureTable() {
  while (oldest_) {
    Node* const node = oldest_;
    oldest_ = node->newer;
    std::free(node);
  }
  delete slots_.load();
}

FeatureLookup FeatureTable::lookup(const int64_t* ids, size_t num_ids, const std::vector<bool>& wanted,
                                   uint32_t oldest, size_t max_bytes) {
  FeatureLookup result;
  std::vector<const Record*> records;
  records.reserve(num_ids);
  const size_t prefetched = std::min(sizeof(Record) + layout_.fixed_bytes(), kMaxPrefetched);
  uint64_t hashes[kBlock];
  uintptr_t entries[kBlock];
  const Grace::Reading reading(grace_);
  const Slots& slots = *slots_.load();
  for (size_t base = 0; base < num_ids; base += kBlock) {
    const size_t count = std::min(num_ids - base, kBlock);
    for (size_t i = 0; i < count; ++i) {
      hashes[i] = hash_int64(load<int64_t>(ids + base + i), 0);
      __builtin_prefetch(&slots.entries[slots.first(hashes[i])]);
      if (!file_.empty()) file_.prefetch(hashes[i]);
    }
    for (size_t i = 0; i < count; ++i) {
      slots.probe(slots.first(hashes[i]), hashes[i], entries[i]);
      if (entries[i]) __builtin_prefetch(Slots::node_of(entries[i]));
    }
    for (size_t i = 0; i < count; ++i) {
      const int64_t id = load<int64_t>(ids + base + i);
      Node* node = Slots::node_of(entries[i]);
      size_t at;
      if (node && node->record.id != id) node = slots.find(id, hashes[i], at);
      const bool is_hidden = node && (node->removed || node->time < oldest);
      if (node && limit_ && !is_hidden && !node->visited.load(std::memory_order_relaxed)) {
        node->visited.store(true, std::memory_order_relaxed);
      }
      const Record* const record = !node ? file_.find(id, hashes[i]) : is_hidden ? nullptr : &node->record;
      if (!record) {
        result.missing.push_back(static_cast<int64_t>(base + i));
        continue;
      }
      records.push_back(record);
      const uint8_t* const begin = reinterpret_cast<const uint8_t*>(record);
      for (size_t line = 0; line < prefetched; line += kLine) __builtin_prefetch(begin + line);
    }
  }
  hits_.fetch_add(static_cast<int64_t>(records.size()), std::memory_order_relaxed);
  misses_.fetch_add(static_cast<int64_t>(result.missing.size()), std::memory_order_relaxed);
  result.columns = layout_.columns_of(records, wanted, max_bytes);
  return result;
}

void FeatureTable::put(const int64_t* ids, size_t num_ids, const std::vector<Column>& columns,
                       const uint64_t* stamps, uint32_t time, uint32_t oldest) {
  std::vector<size_t> sizes(num_ids);  // of all first: a row too large is refused before any is put in
  for (size_t i = 0; i < num_ids; ++i) sizes[i] = layout_.payload_bytes(columns, static_cast<int64_t>(i));
  const std::lock_guard<std::mutex> lock(write_);
  if (!stamps) ++version_;
  for (size_t i = 0; i < num_ids; ++i) {
    const int64_t id = load<int64_t>(ids + i);
    const uint64_t hash = hash_int64(id, 0);
    size_t at;
    Node* old = slots_.load()->find(id, hash, at);
    const bool is_there = old && old->time >= oldest;
    if (stamps && (is_there || written_[stripe_of(hash)] != load<uint64_t>(stamps + i))) continue;
    if (!stamps) written_[stripe_of(hash)] = version_;
    if (limit_ && slot_bytes_ + Node::bytes_of(sizes[i]) > most_) {
      if (old) unlink(at);
      ++evictions_;
      continue;
    }
    make_room(Node::bytes_of(sizes[i]));
    old = slots_.load()->find(id, hash, at);  // what makes room may have moved or taken it
    Node* const node = make_node(id, sizes[i], time);
    layout_.write(columns, static_cast<int64_t>(i), reinterpret_cast<uint8_t*>(&node->record + 1));
    if (old ? old->removed : !file_.find(id, hash)) ++rows_;
    old ? replace(at, old, node, hash) : link(node, hash);
    if (i % kCollectEvery == 0) grace_.collect();
  }
  grace_.collect();
  grace_.collect();
}

int64_t FeatureTable::remove(const int64_t* ids, size_t num_ids, uint32_t time) {
  const std::lock_guard<std::mutex> lock(write_);
  ++version_;
  int64_t removed = 0;
  for (size_t i = 0; i < num_ids; ++i) {
    const int64_t id = load<int64_t>(ids + i);
    const uint64_t hash = hash_int64(id, 0);
    written_[stripe_of(hash)] = version_;
    const bool in_file = file_.find(id, hash) != nullptr;
    size_t at;
    Node* old = slots_.load()->find(id, hash, at);
    if (old ? old->removed : !in_file) continue;
    ++removed;
    if (!in_file) {
      unlink(at);
      continue;
    }
    make_room(0);
    old = slots_.load()->find(id, hash, at);
    Node* const node = make_node(id, 0, time);
    node->removed = true;
    old ? replace(at, old, node, hash) : link(node, hash);
    --rows_;
  }
  grace_.collect();
  grace_.collect();
  return removed;
}

std::vector<uint64_t> FeatureTable::stamps(const int64_t* ids, size_t num_ids) {
  const std::lock_guard<std::mutex> lock(write_);
  std::vector<uint64_t> stamps(num_ids);
  for (size_t i = 0; i < num_ids; ++i) stamps[i] = written_[stripe_of(hash_int64(load<int64_t>(ids + i), 0))];
  return stamps;
}

FeatureStats FeatureTable::stats() {
  const std::lock_guard<std::mutex> lock(write_);
  return FeatureStats{rows_,        static_cast<int64_t>(live_), static_cast<int64_t>(used_bytes()),
                      hits_.load(), misses_.load(),              evictions_,
                      static_cast<int64_t>(version_), oldest_ ? int64_t{oldest_->time} : -1};
}

FeatureTable::Node* FeatureTable::make_node(int64_t id, size_t payload_bytes, uint32_t time) {
  void* const memory = std::malloc(sizeof(Node) + payload_bytes);
  if (!memory) throw std::bad_alloc();
  Node* const node = new (memory) Node{};
  node->time = time;
  node->record = Record{id, static_cast<uint32_t>(payload_bytes), 0};
  node_bytes_ += node->bytes();
  return node;
}

void FeatureTable::link(Node* node, uint64_t hash) {
  Slots& slots = *slots_.load();
  size_t at = slots.first(hash);
  while (slots.entries[at].load(std::memory_order_relaxed) > kLeft) at = slots.after(at);
  used_ += slots.entries[at].load(std::memory_order_relaxed) == 0;
  ++live_;
  node->slot = at;
  append(node);
  slots.entries[at].store(Slots::entry_of(node, hash), std::memory_order_release);
}

void FeatureTable::replace(size_t at, Node* old, Node* node, uint64_t hash) {
  node->slot = at;
  node->visited.store(old->visited.load(std::memory_order_relaxed), std::memory_order_relaxed);
  append(node);
  slots_.load()->entries[at].store(Slots::entry_of(node, hash), std::memory_order_release);
  detach(old);
  retire(old);
}

void FeatureTable::unlink(size_t at) {
  Slots& slots = *slots_.load();
  Node* const node = Slots::node_of(slots.entries[at].load(std::memory_order_relaxed));
  slots.entries[at].store(kLeft, std::memory_order_release);
  // Where a search would end at the next slot, it may end here: else such slots would fill the table.
  if (slots.entries[slots.after(at)].load(std::memory_order_relaxed) == 0) {
    for (; slots.entries[at].load(std::memory_order_relaxed) == kLeft; at = slots.before(at)) {
      slots.entries[at].store(0, std::memory_order_release);
      --used_;
    }
  }
  --live_;
  --rows_;
  detach(node);
  retire(node);
}

// After it a node of so many bytes fits into the limit, and into the slots.
void FeatureTable::make_room(size_t bytes) {
  const size_t capacity = slots_.load()->size;
  if (!limit_) {
    if (2 * (used_ + 1) <= capacity) return;
    size_t wanted = kMinSlots;
    while (wanted < 3 * (live_ + 1)) wanted *= 2;
    return rebuild(wanted);
  }
  while (3 * (live_ + 1) > kLiveOf3 * capacity) evict();
  while (oldest_ && slot_bytes_ + node_bytes_ + bytes > most_) evict();
  // Readers are waited for once in as many rows as fill the spare part, not once a row.
  if (used_bytes() + bytes > limit_) grace_.drain();
  if (6 * (used_ + 1) > kUsedOf6 * capacity) rebuild(capacity);
}

void FeatureTable::rebuild(size_t capacity) {
  if (limit_) grace_.drain();  // the spare part of the limit is now for the new slots
  Slots* const old = slots_.load();
  auto* const slots = new Slots(capacity);
  // By slot, so that nodes can be prefetched and the new slots are written nearly in order.
  for (size_t i = 0; i < old->size; ++i) {
    const uintptr_t ahead = old->entries[std::min(i + kBlock, old->size - 1)].load(std::memory_order_relaxed);
    __builtin_prefetch(Slots::node_of(ahead), 1);
    const uintptr_t entry = old->entries[i].load(std::memory_order_relaxed);
    if (entry <= kLeft) continue;
    Node* const node = Slots::node_of(entry);
    const uint64_t hash = hash_int64(node->record.id, 0);
    size_t at = slots->first(hash);
    while (slots->entries[at].load(std::memory_order_relaxed)) at = slots->after(at);
    slots->entries[at].store(Slots::entry_of(node, hash), std::memory_order_relaxed);
    node->slot = at;
  }
  slots_.store(slots);
  used_ = live_;
  grace_.retire(old, limit_ ? 1 : old->size * sizeof(uintptr_t), [](void* p) { delete static_cast<Slots*>(p); });
  if (limit_) return grace_.drain();
  slot_bytes_ = capacity * sizeof(uintptr_t);
}

// SIEVE (Zhang et al., NSDI 2024): from old to new, whoever was looked up since the last pass stays once more.
void FeatureTable::evict() {
  Node* node = hand_ ? hand_ : oldest_;
  while (node->visited.exchange(false, std::memory_order_relaxed)) {
    node = node->newer ? node->newer : oldest_;
  }
  hand_ = node->newer;  // null: starts over
  unlink(node->slot);
  ++evictions_;
}

void FeatureTable::retire(Node* node) {
  node_bytes_ -= node->bytes();
  grace_.retire(node, node->bytes(), std::free);
}

void FeatureTable::append(Node* node) {
  node->older = newest_;
  node->newer = nullptr;
  (newest_ ? newest_->newer : oldest_) = node;
  newest_ = node;
}

void FeatureTable::detach(Node* node) {
  (node->newer ? node->newer->older : newest_) = node->older;
  (node->older ? node->older->newer : oldest_) = node->newer;
  if (hand_ == node) hand_ = node->newer;
}

size_t FeatureTable::used_bytes() const { return slot_bytes_ + node_bytes_ + grace_.bytes(); }

}  // namespace xlarank
