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
