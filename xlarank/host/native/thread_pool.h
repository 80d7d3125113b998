// Helper threads that stay, and take part in one loop at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace xlarank {

class ThreadPool {
 public:
  // `num_threads`: the caller of `run` among them. Throws std::system_error if they can't be had.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(helpers_.size()) + 1; }

  // Calls body(i) for each i in [0, count), in any order and thread, and returns when all are done. Rethrows
  // the first exception. Any thread may call; while another's loop runs, the caller does its own work alone.
  // It never waits for a helper that has not started.
  void run(int64_t count, const std::function<void(int64_t)>& body);

 private:
  struct Loop {
    int64_t count;
    const std::function<void(int64_t)>* body;
    std::atomic<int64_t> next{0};
    std::exception_ptr error{};  // guarded by mutex_
  };

  void stop();
  void help();
  void work(Loop& loop);

  std::mutex busy_;  // held by the caller whose loop runs
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
  Loop* loop_ = nullptr;   // guarded by mutex_; null = nothing to join
  uint64_t sequence_ = 0;  // guarded by mutex_; number of the loop, so that a helper joins it once
  int num_inside_ = 0;     // guarded by mutex_; helpers that may touch *loop_
  bool stopping_ = false;  // guarded by mutex_
  std::vector<std::thread> helpers_;
};

}  // namespace xlarank
