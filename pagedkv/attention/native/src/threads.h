// Threads of a parallel region that share work and wait for each other. OpenMP begins and ends the region, no more: its own barriers look for milliseconds before they
// give the processor away, which takes as long where there are fewer processors free than threads.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif

// Where the threads of one region meet.
class Meeting {
 public:
  // Until all have come.
  void wait(int num_threads) {
    const int now = round.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
      arrived.store(0, std::memory_order_relaxed);
      next.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int looks = 0; round.load(std::memory_order_acquire) == now; looks++) {
      if (looks < MOST_LOOKS) rest();
      else sched_yield();
    }
  }

  // The number of a piece of work that nobody has taken since the last time that all had come.
  int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }

 private:
  static constexpr int MOST_LOOKS = 2000;  // some 50 to 100 us

  static void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};
  alignas(64) std::atomic<int64_t> next{0};
};

// One thread's share of work that several do together, or all of it for a thread alone.
class Share {
 public:
  static Share alone() { return {0, 1, nullptr}; }
  static Share among_all(Meeting& meeting) { return {THREAD, THREADS, &meeting}; }

  const int part, parts;

  // A run of ``count`` pieces that are alike.
  int64_t begin(int64_t count) const { return count * part / parts; }
  int64_t end(int64_t count) const { return count * (part + 1) / parts; }

  // Pieces that are not alike, one at a time to whoever is free; then waits for the others.
  template <class Work>
  void each(int64_t count, Work work) const {
    each_with_next(count, [](int64_t) { return false; }, [&](int64_t i, int64_t) { work(i); });
  }

  // The same, and ``work`` is told what this thread does next: after a piece that ``is_short`` it is taken before that is begun, as long as others find
  // enough; -1 where it is not known, ``count`` or more where none is left.
  template <class IsShort, class Work>
  void each_with_next(int64_t count, IsShort is_short, Work work) const {
    const auto take = [&](int64_t last) { return parts == 1 ? last + 1 : meeting->take(); };
    for (int64_t i = take(-1), next; i < count; i = next < 0 ? take(i) : next) {
      next = parts == 1 || (i + 2 * parts < count && is_short(i)) ? take(i) : -1;
      work(i, next);
    }
    wait();
  }

  // Until the others have done theirs.
  void wait() const {
    if (parts > 1) meeting->wait(parts);
  }

 private:
  Share(int part, int parts, Meeting* meeting) : part(part), parts(parts), meeting(meeting) {}

  Meeting* meeting;
};
