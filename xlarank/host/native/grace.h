// When memory that readers may still look at can be freed: readers never wait, writers do at most for those who
// are reading at that moment.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace xlarank {

// Two counters of readers take turns. What was unlinked while one of them counted is freed once the other counts
// and the first has come to 0: nobody who reads then began before it was unlinked.
class Grace {
 public:
  // Held while reading. What can be reached when it begins stays until it ends.
  class Reading {
   public:
    explicit Reading(Grace& grace) : grace_(grace) {
      for (;;) {
        turn_ = grace_.turn_.load();
        grace_.readers_[turn_ & 1].fetch_add(1);
        if (grace_.turn_.load() == turn_) return;
        grace_.readers_[turn_ & 1].fetch_sub(1);  // the turn has passed in between
      }
    }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;
    ~Reading() { grace_.readers_[turn_ & 1].fetch_sub(1); }

   private:
    Grace& grace_;
    uint64_t turn_;
  };

  Grace() = default;
  Grace(const Grace&) = delete;
  Grace& operator=(const Grace&) = delete;
  ~Grace() {
    free_all(before_);
    free_all(now_);
  }

  // One writer at a time calls what follows.

  // Takes what was just unlinked; freed later by `release(pointer)`.
  void retire(void* pointer, size_t bytes, void (*release)(void*)) {
    now_.push_back(Garbage{pointer, bytes, release});
    bytes_ += bytes;
  }

  // Bytes that are unlinked and not yet freed.
  size_t bytes() const { return bytes_; }

  // Frees what it can without waiting. Two calls free everything if nobody reads.
  void collect() {
    const uint64_t turn = turn_.load();
    if (readers_[(turn + 1) & 1].load() != 0) return;
    free_all(before_);
    before_.swap(now_);
    turn_.store(turn + 1);
  }

  // Frees everything, waiting for those who read.
  void drain() {
    while (bytes_ != 0) {
      const size_t left = before_.size() + now_.size();
      collect();
      if (before_.size() + now_.size() == left && bytes_ != 0) std::this_thread::yield();
    }
  }

 private:
  struct Garbage {
    void* pointer;
    size_t bytes;
    void (*release)(void*);
  };

  void free_all(std::vector<Garbage>& items) {
    for (const Garbage& item : items) {
      item.release(item.pointer);
      bytes_ -= item.bytes;
    }
    items.clear();
  }

  std::atomic<uint64_t> turn_{0};
  std::atomic<int64_t> readers_[2] = {};
  std::vector<Garbage> before_, now_;  // unlinked in the turn before, and in this one
  size_t bytes_ = 0;
};

}  // namespace xlarank
