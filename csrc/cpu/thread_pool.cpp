#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "checks.h"

namespace gpt2rt {
namespace {

// how long a thread spins before it sleeps: longer than a phase's imbalance, shorter than a scheduler's time slice
constexpr auto kSpinTime = std::chrono::microseconds(50);

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A counter on which threads wait for a change.
class Signal {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void raise() {
    // both operations sequentially consistent, as are the waiter's two: either the waiter sees the new value or this
    // thread sees the waiter
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }
    changed_.notify_all();
  }

  void wait_while(uint32_t old) {
    const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int i = 0; i < 64; ++i) {
        if (value() != old) return;
        cpu_relax();
      }
    } while (std::chrono::steady_clock::now() < deadline);
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    changed_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != old; });
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  alignas(64) std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

class ThreadPool {
 public:
  using Task = void (*)(void* context, int phase, int thread, int threads);

  void run(int num_threads, int num_phases, Task task, void* context) {
    std::lock_guard<std::mutex> lock(run_mutex_);
    const int threads = start_threads(num_threads);
    job_ = {num_phases, threads, task, context};
    failing_.store(false, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    for (int i = 1; i < threads; ++i) workers_[i - 1]->go.raise();
    work(job_, 0);
    if (failed_.load(std::memory_order_acquire)) {
      std::exception_ptr error;
      std::swap(error, error_);
      std::rethrow_exception(error);
    }
  }

  void shut_down() {
    std::lock_guard<std::mutex> lock(run_mutex_);
    closed_ = true;
    stop_.store(true, std::memory_order_release);
    for (auto& worker : workers_) worker->go.raise();
    for (auto& worker : workers_) worker->thread.join();
    workers_.clear();
  }

 private:
  struct Job {
    int num_phases;
    int threads;
    Task task;
    void* context;
  };

  struct Worker {
    Signal go;
    std::thread thread;
  };

  // makes sure of num_threads - 1 workers; returns how many threads there are, the caller included
  int start_threads(int num_threads) {
    if (closed_) return 1;
    while (static_cast<int>(workers_.size()) < num_threads - 1) {
      // signals stay with the program's own threads
      sigset_t all, old;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &old);
      bool started = false;
      try {
        auto worker = std::make_unique<Worker>();
        const int index = static_cast<int>(workers_.size()) + 1;
        Worker* self = worker.get();
        // before the thread, so that nothing can fail after it
        workers_.reserve(workers_.size() + 1);
        worker->thread = std::thread([this, self, index] { serve(*self, index); });
        workers_.push_back(std::move(worker));
        started = true;
      } catch (const std::system_error&) {
        // no more threads to be had: the run is slower, its result the same
      } catch (const std::bad_alloc&) {
      }
      pthread_sigmask(SIG_SETMASK, &old, nullptr);
      if (!started) break;
    }
    return std::min(num_threads, static_cast<int>(workers_.size()) + 1);
  }

  void serve(Worker& self, int index) {
    uint32_t seen = 0;
    while (true) {
      self.go.wait_while(seen);
      ++seen;
      if (stop_.load(std::memory_order_acquire)) return;
      work(job_, index);
    }
  }

  // by value: once the last barrier is passed, job_ may already be the next run's
  void work(Job job, int index) {
    for (int phase = 0; phase < job.num_phases; ++phase) {
      // after a failure the threads still meet at every barrier, but do nothing in between
      if (!failed_.load(std::memory_order_acquire)) {
        try {
          job.task(job.context, phase, index, job.threads);
        } catch (...) {
          if (!failing_.exchange(true, std::memory_order_acq_rel)) {
            error_ = std::current_exception();
            failed_.store(true, std::memory_order_release);
          }
        }
      }
      barrier(job.threads);
    }
  }

  void barrier(int threads) {
    const uint32_t generation = barrier_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      barrier_.raise();
    } else {
      barrier_.wait_while(generation);
    }
  }

  std::mutex run_mutex_;
  bool closed_ = false;
  std::atomic<bool> stop_{false};
  std::vector<std::unique_ptr<Worker>> workers_;
  Job job_{};
  std::atomic<bool> failing_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  alignas(64) std::atomic<int> arrived_{0};
  Signal barrier_;
};

// never freed: threads of the program may still call while it ends, and a forked child must not touch its parent's
std::atomic<ThreadPool*> g_pool{nullptr};

void shut_down_at_exit() {
  if (ThreadPool* pool = g_pool.load(std::memory_order_acquire)) pool->shut_down();
}

ThreadPool& pool() {
  static const bool prepared = [] {
    // the child starts with no pool; its parent's threads do not exist there and its locks may be held by them
    pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr, std::memory_order_release); });
    std::atexit(shut_down_at_exit);
    return true;
  }();
  (void)prepared;
  ThreadPool* current = g_pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    auto created = std::make_unique<ThreadPool>();
    if (g_pool.compare_exchange_strong(current, created.get(), std::memory_order_acq_rel)) {
      current = created.release();
    }
  }
  return *current;
}

struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

void run_phases(int num_threads, int num_phases, void (*task)(void* context, int phase, int thread, int threads),
                void* context) {
  if (num_threads <= 1) {
    for (int phase = 0; phase < num_phases; ++phase) task(context, phase, 0, 1);
    return;
  }
  pool().run(num_threads, num_phases, task, context);
}

int default_num_threads() {
  const char* text = std::getenv("GPT2RT_NUM_THREADS");
  if (text == nullptr || *text == '\0') {
    return std::clamp(static_cast<int>(torch::stable::get_num_threads()), 1, kMaxThreads);
  }
  char* end = nullptr;
  errno = 0;
  const long value = std::strtol(text, &end, 10);
  GPT2RT_CHECK(errno == 0 && *end == '\0' && value >= 1 && value <= kMaxThreads, "GPT2RT_NUM_THREADS is '", text,
               "', expected a whole number from 1 to ", kMaxThreads, "; unset it for torch's number of threads");
  return static_cast<int>(value);
}

int resolve_num_threads(int64_t num_threads) {
  GPT2RT_CHECK(num_threads >= 0 && num_threads <= kMaxThreads, "num_threads is ", num_threads, ", expected 1 to ",
               kMaxThreads, ", or 0 for GPT2RT_NUM_THREADS or torch's number");
  return num_threads == 0 ? default_num_threads() : static_cast<int>(num_threads);
}

void* thread_scratch(size_t bytes) {
  thread_local Scratch scratch;
  if (scratch.size < bytes) {
    std::free(scratch.memory);
    scratch.memory = nullptr;
    scratch.size = 0;
    const size_t rounded = (bytes + 63) / 64 * 64;
    scratch.memory = std::aligned_alloc(64, rounded);
    if (scratch.memory == nullptr) throw std::bad_alloc();
    scratch.size = rounded;
  }
  return scratch.memory;
}

}  // namespace gpt2rt
