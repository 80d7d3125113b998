#include "thread_pool.h"

namespace xlarank {

ThreadPool::ThreadPool(int num_threads) {
  try {
    for (int i = 1; i < num_threads; ++i) helpers_.emplace_back([this] { help(); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void ThreadPool::run(int64_t count, const std::function<void(int64_t)>& body) {
  std::unique_lock busy(busy_, std::defer_lock);
  if (helpers_.empty() || count < 2 || !busy.try_lock()) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  Loop loop{count, &body};
  {
    std::lock_guard lock(mutex_);
    loop_ = &loop;
    ++sequence_;
  }
  wake_.notify_all();
  work(loop);
  std::unique_lock lock(mutex_);
  loop_ = nullptr;
  left_.wait(lock, [this] { return num_inside_ == 0; });
  if (loop.error) std::rethrow_exception(loop.error);
}

void ThreadPool::help() {
  uint64_t joined = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stopping_ || (loop_ && sequence_ != joined); });
    if (stopping_) return;
    Loop& loop = *loop_;
    joined = sequence_;
    ++num_inside_;
    lock.unlock();
    work(loop);
    lock.lock();
    if (--num_inside_ == 0) left_.notify_all();
  }
}

void ThreadPool::work(Loop& loop) {
  try {
    for (;;) {
      const int64_t i = loop.next.fetch_add(1, std::memory_order_relaxed);
      if (i >= loop.count) return;
      (*loop.body)(i);
    }
  } catch (...) {
    std::lock_guard lock(mutex_);
    if (!loop.error) loop.error = std::current_exception();
    loop.next.store(loop.count, std::memory_order_relaxed);
  }
}

}  // namespace xlarank
