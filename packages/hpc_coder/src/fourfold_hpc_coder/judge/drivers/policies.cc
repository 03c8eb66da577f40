// Counts what the standard library's parallel algorithms divide among threads, which GCC has TBB do.
#include "server.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <oneapi/tbb/global_control.h>

namespace {

// TBB asks the machine how many threads to have, and not the launch.
const char *asked = std::getenv("OMP_NUM_THREADS");
std::size_t threads = std::max(1, asked ? std::atoi(asked) : 1);
tbb::global_control limited(tbb::global_control::max_allowed_parallelism, threads);

// Algorithms within an algorithm are part of the outer one; its other threads begin none that count.
thread_local bool is_caller = false;
bool begun = is_caller = true;
std::atomic<long> offered{0}; // parts of work, to other threads

} // namespace

#define EXECUTE_AND_WAIT(prefix)                                                                          \
  prefix##_ZN3tbb6detail2r116execute_and_waitERNS0_2d14taskERNS2_18task_group_contextERNS2_12wait_contextES6_

extern "C" void EXECUTE_AND_WAIT(__real_)(void *, void *, void *, void *);
extern "C" void EXECUTE_AND_WAIT(__wrap_)(void *task, void *context, void *wait, void *own) {
  if (!is_caller) return EXECUTE_AND_WAIT(__real_)(task, context, wait, own);
  is_caller = false;
  long before = offered;
  double main_s = fourfold::seconds(CLOCK_THREAD_CPUTIME_ID);
  EXECUTE_AND_WAIT(__real_)(task, context, wait, own);
  fourfold::evidence.region_cpu_s += fourfold::seconds(CLOCK_THREAD_CPUTIME_ID) - main_s;
  fourfold::evidence.regions += 1;
  // Threads take parts in turns, so that on a busy machine one may take them all.
  if (offered > before) fourfold::evidence.team = threads;
  is_caller = true;
}

#define SPAWN(prefix) prefix##_ZN3tbb6detail2r15spawnERNS0_2d14taskERNS2_18task_group_contextE

extern "C" void SPAWN(__real_)(void *, void *);
extern "C" void SPAWN(__wrap_)(void *task, void *context) {
  offered.fetch_add(1, std::memory_order_relaxed);
  SPAWN(__real_)(task, context);
}
