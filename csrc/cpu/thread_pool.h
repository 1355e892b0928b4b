// The project's own threads: started at the first call that needs them, kept until the process ends.
//
// A run is a list of phases with a barrier after each. The caller is thread 0. Waiting threads spin for some tens of
// microseconds, then sleep. One run at a time: callers in other threads of the process wait for their turn. After a
// fork the child has no threads and builds its pool anew. Which thread does what must not influence results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace gpt2rt {

// calls task(context, phase, thread, threads) for each phase in order, on `threads` threads at once (at most
// num_threads; fewer if the system gives no more). An exception in one thread ends the run after that phase and is
// thrown here.
void run_phases(int num_threads, int num_phases, void (*task)(void* context, int phase, int thread, int threads),
                void* context);

template <typename F>
void run_phases(int num_threads, int num_phases, F&& f) {
  using Function = std::remove_reference_t<F>;
  run_phases(
      num_threads, num_phases,
      [](void* context, int phase, int thread, int threads) {
        (*static_cast<Function*>(context))(phase, thread, threads);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f(begin, end) over parts of 0..n, one part a thread; on the calling thread alone if n * work is small (work: about
// the float operations of one index)
template <typename F>
void parallel_rows(int64_t n, int64_t work, const F& f);

// GPT2RT_NUM_THREADS if it is set, else torch's number of threads
int default_num_threads();
// num_threads as given to an op: 0 means the default; raises for anything that is not 0..kMaxThreads
int resolve_num_threads(int64_t num_threads);
constexpr int kMaxThreads = 1024;

// the part of 0..n that falls to a thread
struct Range {
  int64_t begin;
  int64_t end;
};

inline Range thread_range(int64_t n, int thread, int threads) {
  const int64_t part = n / threads;
  const int64_t rest = n % threads;
  const int64_t begin = part * thread + (thread < rest ? thread : rest);
  return {begin, begin + part + (thread < rest ? 1 : 0)};
}

// 64-byte aligned memory of the calling thread, valid until its next call here; at least `bytes`, not initialised
void* thread_scratch(size_t bytes);
inline float* thread_scratch_floats(int64_t floats) {
  return static_cast<float*>(thread_scratch(static_cast<size_t>(floats) * sizeof(float)));
}

template <typename F>
void parallel_rows(int64_t n, int64_t work, const F& f) {
  // below this a thread's wake-up costs more than it brings
  constexpr int64_t kSerialWork = 64 * 1024;
  if (n <= 1 || n <= kSerialWork / (work > 0 ? work : 1)) {
    f(int64_t{0}, n);
    return;
  }
  const int num_threads = default_num_threads();
  run_phases(n < num_threads ? static_cast<int>(n) : num_threads, 1, [&](int, int thread, int threads) {
    const Range range = thread_range(n, thread, threads);
    f(range.begin, range.end);
  });
}

}  // namespace gpt2rt
