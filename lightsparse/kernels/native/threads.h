// The threads of one call, and what becomes of an exception in one of them.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(IN_EACH_THREAD)
#define IN_EACH_THREAD(me)  // a test defines it, to throw in a thread of its choice
#endif

namespace {

// `run` gives every thread the same function and returns when all are done, or throws what the first of them threw.
class Team {
 public:
  explicit Team(int wanted) {
    threads_.reserve(wanted);
    try {
      for (int i = 1; i < wanted; i++) threads_.emplace_back([this, i] { work(i); });
    } catch (const std::exception &) {  // fewer threads than asked for: the work is divided among those there are
    }
  }
  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = nullptr, round_++;
    }
    start_.notify_all();
    for (auto &thread : threads_) thread.join();
  }
  Team(const Team &) = delete;

  int size() const { return (int)threads_.size() + 1; }

  void run(const std::function<void(int)> &task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task, busy_ = (int)threads_.size(), round_++, thrown_ = nullptr;
    }
    start_.notify_all();
    attempt(task, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    if (thrown_) std::rethrow_exception(thrown_);
  }

 private:
  void work(int me) {
    for (uint64_t seen = 0;;) {
      const std::function<void(int)> *task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return round_ != seen; });
        seen = round_, task = task_;
      }
      if (!task) return;
      attempt(*task, me);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void attempt(const std::function<void(int)> &task, int me) {
    try {
      IN_EACH_THREAD(me)
      task(me);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!thrown_) thrown_ = std::current_exception();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int)> *task_ = nullptr;
  std::exception_ptr thrown_;
  uint64_t round_ = 0;
  int busy_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace
