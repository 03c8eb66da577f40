// What -fopenmp defines, taken back while the prelude is included, which is precompiled without; and OpenMP.
#define _OPENMP 201511
#define _REENTRANT 1
#include <omp.h>
