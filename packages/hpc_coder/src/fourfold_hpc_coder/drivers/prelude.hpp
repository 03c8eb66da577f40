// What every candidate may use without asking: precompiled once per parallel model.
#include <algorithm>
#include <array>
#include <atomic>
#include <bitset>
#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iostream>
#include <iterator>
#include <limits>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <queue>
#include <random>
#include <set>
#include <sstream>
#include <stack>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>
#ifdef FOURFOLD_OPENMP
#include <omp.h>
#endif
#ifdef FOURFOLD_MPI
#include <mpi.h>
#endif
#ifdef FOURFOLD_KOKKOS
#include <Kokkos_Core.hpp>
#endif
