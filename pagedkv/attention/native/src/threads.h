// Which of a parallel region's threads runs, and how many there are; one where the compiler has no OpenMP.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif

#include <cstdint>

// One thread's share of work that several threads do together, or all of it for a thread alone.
struct Share {
  int part, parts;

  static Share of_all() { return {THREAD, THREADS}; }
  static Share alone() { return {0, 1}; }
  int64_t begin(int64_t count) const { return count * part / parts; }
  int64_t end(int64_t count) const { return count * (part + 1) / parts; }

  // Until the others have done theirs.
  void wait() const {
    if (parts == 1) return;
#pragma omp barrier
  }
};
