// Counts what runs inside OpenMP's parallel regions.
#include "regions.hpp"
#include "server.hpp"

#include <algorithm>
#include <atomic>

namespace {

thread_local bool inside = false; // a region within a region is part of the outer one

struct Watched {
  Body body;
  void *data;
  std::atomic<int> team{0};
  std::atomic<double> all_s{0}, most_s{0}; // processor time of the threads, and of the busiest
};

void run(void *watched) {
  auto *one = static_cast<Watched *>(watched);
  one->team.fetch_add(1, std::memory_order_relaxed);
  bool before = std::exchange(inside, true);
  double began_s = fourfold::seconds(CLOCK_THREAD_CPUTIME_ID);
  one->body(one->data);
  double spent_s = fourfold::seconds(CLOCK_THREAD_CPUTIME_ID) - began_s;
  for (double held = one->all_s; !one->all_s.compare_exchange_weak(held, held + spent_s);) {}
  for (double held = one->most_s; held < spent_s && !one->most_s.compare_exchange_weak(held, spent_s);) {}
  inside = before;
}

} // namespace

void watch(Body body, void *data, const Enter &enter) {
  if (inside) return enter(body, data);
  Watched watched{body, data};
  double began_s = fourfold::seconds(CLOCK_THREAD_CPUTIME_ID);
  enter(run, &watched);
  fourfold::evidence.region_cpu_s += fourfold::seconds(CLOCK_THREAD_CPUTIME_ID) - began_s;
  fourfold::evidence.regions += 1;
  fourfold::evidence.team_cpu_s += watched.all_s;
  fourfold::evidence.busiest_cpu_s += watched.most_s;
  fourfold::evidence.team = std::max<double>(fourfold::evidence.team, watched.team);
}
