// A race checker for OpenMP, under the names that -fsanitize=thread makes the compiler call.
//
// The sanitizer's own library does not know libgomp's barriers and reserves terabytes of addresses, which no
// memory limit allows. This one knows what GCC's OpenMP calls order, and little else: two accesses to one byte
// race if they come from two threads of a region, in the same stretch between two barriers, at least one
// writes, and they hold no lock in common. That does not depend on who came first, so it is seen in one run,
// however few processors there are. Tasks, nested regions and loops whose iterations wait for one another order
// accesses in ways not modelled: a program that uses them is not judged, and says so.
#include "regions.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <unordered_map>

namespace {

constexpr std::uint64_t atomic_lock = 1, critical_lock = 2, ordered_lock = 4;

struct Access {
  int thread = -1; // -2: several
  std::uint64_t locks = 0;
  void *code = nullptr;
};

struct Cell {
  std::uint64_t stretch = 0;
  Access write, read;
};

std::mutex guard;
std::unordered_map<std::uintptr_t, Cell> shadow;
std::atomic<std::uint64_t> regions{0};
std::atomic<bool> unknown{false};
std::atomic<int> reported{0};

thread_local bool inside = false, busy = false;
thread_local int constructing = 0; // statics of functions: who finds one ready was after who made it
thread_local int self = 0;
thread_local std::uint64_t stretch = 0, locks = 0;
thread_local unsigned accesses = 0;

void give_up() {
  if (!unknown.exchange(true)) std::fputs("fourfold-race unknown\n", stderr);
}

void report(const Access &one, const Access &other, bool both_write) {
  if (unknown || reported.fetch_add(1) >= 4) return;
  std::fprintf(stderr, "fourfold-race %s %p %p\n", both_write ? "write" : "read", one.code, other.code);
}

bool conflict(const Access &before, const Access &now) {
  return before.thread != -1 && before.thread != now.thread && !(before.locks & now.locks);
}

void record(std::uintptr_t address, std::size_t bytes, bool writes, const Access &now) {
  std::lock_guard lock(guard);
  for (std::size_t i = 0; i < bytes; ++i) {
    Cell &cell = shadow[address + i];
    if (cell.stretch != stretch) cell = Cell{stretch, {}, {}};
    if (conflict(cell.write, now)) {
      report(cell.write, now, writes);
      break;
    }
    if (writes && conflict(cell.read, now)) {
      report(cell.read, now, false);
      break;
    }
    Access &kept = writes ? cell.write : cell.read;
    std::uint64_t held = kept.thread == -1 ? now.locks : kept.locks & now.locks;
    kept = Access{kept.thread == -1 || kept.thread == self ? self : -2, held, now.code};
  }
}

void touch(void *address, std::size_t bytes, bool writes, std::uint64_t held, void *code) {
  if (!inside || busy || constructing || unknown || reported) return;
  busy = true; // the checker's own lock is none of the program's
  if (++accesses % 32 == 0) sched_yield(); // let the other threads have a share of a dynamic loop
  record(reinterpret_cast<std::uintptr_t>(address), bytes, writes, Access{self, held, code});
  busy = false;
}

struct Watched {
  Body body;
  void *data;
  std::uint64_t region;
  std::atomic<int> entered{0};
};

void run(void *watched) {
  auto *one = static_cast<Watched *>(watched);
  one->entered.fetch_add(1);
  while (one->entered < omp_get_num_threads()) sched_yield(); // nobody finishes before all have begun
  self = omp_get_thread_num();
  stretch = one->region << 32;
  locks = 0;
  inside = true;
  one->body(one->data);
  inside = false;
}

// Locks are told apart up to 60; how many of those that share a bit are held is counted.
thread_local std::array<unsigned, 60> taken{};

std::size_t place(const void *lock) { return reinterpret_cast<std::uintptr_t>(lock) / sizeof(omp_lock_t) % taken.size(); }

void take(const void *lock) {
  if (busy) return;
  taken[place(lock)] += 1;
  locks |= std::uint64_t{8} << place(lock);
}

void drop(const void *lock) {
  if (busy || (taken[place(lock)] && --taken[place(lock)])) return;
  locks &= ~(std::uint64_t{8} << place(lock));
}

} // namespace

void watch(Body body, void *data, const Enter &enter) {
  if (inside) {
    give_up();
    return enter(body, data);
  }
  {
    std::lock_guard lock(guard);
    shadow = {}; // nothing races with regions before, and their cells would take the place of what is freed
  }
  Watched watched{body, data, ++regions};
  enter(run, &watched);
}

// Memory that one thread frees may be given to another: within a region nothing is given back.
namespace fourfold {
void give_back(void *held) noexcept; // see fences.hpp
}
void operator delete(void *address) noexcept {
  if (!inside) fourfold::give_back(address);
}
void operator delete(void *address, std::size_t) noexcept { operator delete(address); }

#define ORDERED_AFTER(name)                                                                               \
  extern "C" void __real_##name();                                                                        \
  extern "C" void __wrap_##name() {                                                                       \
    __real_##name();                                                                                      \
    stretch += 1;                                                                                         \
  }
#define LOCKED(start, end, held)                                                                          \
  extern "C" void __real_##start();                                                                       \
  extern "C" void __real_##end();                                                                         \
  extern "C" void __wrap_##start() {                                                                      \
    __real_##start();                                                                                     \
    locks |= held;                                                                                        \
  }                                                                                                       \
  extern "C" void __wrap_##end() {                                                                        \
    locks &= ~std::uint64_t{held};                                                                        \
    __real_##end();                                                                                       \
  }
#define LOCKED_BY(start, end, type)                                                                       \
  extern "C" void __real_##start(type *);                                                                 \
  extern "C" void __real_##end(type *);                                                                   \
  extern "C" void __wrap_##start(type *lock) {                                                            \
    __real_##start(lock);                                                                                 \
    take(lock);                                                                                           \
  }                                                                                                       \
  extern "C" void __wrap_##end(type *lock) {                                                              \
    drop(lock);                                                                                           \
    __real_##end(lock);                                                                                   \
  }
#define TRIED(try, type)                                                                                  \
  extern "C" int __real_##try(type *);                                                                    \
  extern "C" int __wrap_##try(type *lock) {                                                               \
    int depth = __real_##try(lock);                                                                       \
    if (depth) take(lock);                                                                                \
    return depth;                                                                                         \
  }
#define ORDERED_AFTER_UNLESS_CANCELLED(name)                                                              \
  extern "C" bool __real_##name();                                                                        \
  extern "C" bool __wrap_##name() {                                                                       \
    bool cancelled = __real_##name();                                                                     \
    stretch += 1;                                                                                         \
    return cancelled;                                                                                     \
  }
// What one thread did before it posts, another may rely on that waited.
#define POSTED(name, type)                                                                                \
  extern "C" void __real_##name(type *);                                                                  \
  extern "C" void __wrap_##name(type *counts) {                                                           \
    give_up();                                                                                            \
    __real_##name(counts);                                                                                \
  }

ORDERED_AFTER(GOMP_barrier)
ORDERED_AFTER(GOMP_loop_end)
ORDERED_AFTER(GOMP_sections_end)
ORDERED_AFTER_UNLESS_CANCELLED(GOMP_barrier_cancel)
ORDERED_AFTER_UNLESS_CANCELLED(GOMP_loop_end_cancel)
ORDERED_AFTER_UNLESS_CANCELLED(GOMP_sections_end_cancel)
LOCKED(GOMP_critical_start, GOMP_critical_end, critical_lock)
LOCKED(GOMP_atomic_start, GOMP_atomic_end, atomic_lock)
LOCKED(GOMP_ordered_start, GOMP_ordered_end, ordered_lock)
LOCKED_BY(GOMP_critical_name_start, GOMP_critical_name_end, void *)
LOCKED_BY(omp_set_lock, omp_unset_lock, omp_lock_t)
LOCKED_BY(omp_set_nest_lock, omp_unset_nest_lock, omp_nest_lock_t)
TRIED(omp_test_lock, omp_lock_t)
TRIED(omp_test_nest_lock, omp_nest_lock_t)
POSTED(GOMP_doacross_post, long)
POSTED(GOMP_doacross_ull_post, unsigned long long)

// `single copyprivate`: the others wait for what one hands out.
extern "C" void *__real_GOMP_single_copy_start();
extern "C" void *__wrap_GOMP_single_copy_start() {
  void *handed = __real_GOMP_single_copy_start();
  if (handed) stretch += 1;
  return handed;
}
extern "C" void __real_GOMP_single_copy_end(void *);
extern "C" void __wrap_GOMP_single_copy_end(void *handed) {
  __real_GOMP_single_copy_end(handed);
  stretch += 1;
}

// std::mutex.
extern "C" int __real_pthread_mutex_lock(pthread_mutex_t *);
extern "C" int __wrap_pthread_mutex_lock(pthread_mutex_t *lock) {
  int code = __real_pthread_mutex_lock(lock);
  if (!code) take(lock);
  return code;
}
extern "C" int __real_pthread_mutex_trylock(pthread_mutex_t *);
extern "C" int __wrap_pthread_mutex_trylock(pthread_mutex_t *lock) {
  int code = __real_pthread_mutex_trylock(lock);
  if (!code) take(lock);
  return code;
}
extern "C" int __real_pthread_mutex_unlock(pthread_mutex_t *);
extern "C" int __wrap_pthread_mutex_unlock(pthread_mutex_t *lock) {
  drop(lock);
  return __real_pthread_mutex_unlock(lock);
}

extern "C" int __real___cxa_guard_acquire(void *);
extern "C" int __wrap___cxa_guard_acquire(void *made) {
  int first = __real___cxa_guard_acquire(made);
  constructing += first != 0;
  return first;
}
extern "C" void __real___cxa_guard_release(void *);
extern "C" void __wrap___cxa_guard_release(void *made) {
  constructing -= 1;
  __real___cxa_guard_release(made);
}
extern "C" void __real___cxa_guard_abort(void *);
extern "C" void __wrap___cxa_guard_abort(void *made) {
  constructing -= 1;
  __real___cxa_guard_abort(made);
}

extern "C" void __real_GOMP_task(Body, void *, void (*)(void *, void *), long, long, bool, unsigned, void **,
                                 int, void *);
extern "C" void __wrap_GOMP_task(Body body, void *data, void (*copy)(void *, void *), long size, long align,
                                 bool condition, unsigned flags, void **depend, int priority, void *detach) {
  give_up();
  __real_GOMP_task(body, data, copy, size, align, condition, flags, depend, priority, detach);
}
#define TASKLOOP(name, type)                                                                              \
  extern "C" void __real_##name(Body, void *, void (*)(void *, void *), long, long, unsigned,            \
                                unsigned long, int, type, type, type);                                    \
  extern "C" void __wrap_##name(Body body, void *data, void (*copy)(void *, void *), long size,          \
                                long align, unsigned flags, unsigned long tasks, int priority,            \
                                type first, type last, type step) {                                       \
    give_up();                                                                                            \
    __real_##name(body, data, copy, size, align, flags, tasks, priority, first, last, step);              \
  }
TASKLOOP(GOMP_taskloop, long)
TASKLOOP(GOMP_taskloop_ull, unsigned long long)

// What instrumented code calls.
#define CODE __builtin_return_address(0)
#define PLAIN(bytes)                                                                                      \
  extern "C" void __tsan_read##bytes(void *a) { touch(a, bytes, false, locks, CODE); }                    \
  extern "C" void __tsan_write##bytes(void *a) { touch(a, bytes, true, locks, CODE); }                    \
  extern "C" void __tsan_unaligned_read##bytes(void *a) { touch(a, bytes, false, locks, CODE); }          \
  extern "C" void __tsan_unaligned_write##bytes(void *a) { touch(a, bytes, true, locks, CODE); }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)
extern "C" void __tsan_read_range(void *a, std::size_t n) { touch(a, n, false, locks, CODE); }
extern "C" void __tsan_write_range(void *a, std::size_t n) { touch(a, n, true, locks, CODE); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void *, void *) {}
extern "C" void __tsan_vptr_read(void *) {}
extern "C" void __tsan_atomic_thread_fence(int) { std::atomic_thread_fence(std::memory_order_seq_cst); }
extern "C" void __tsan_atomic_signal_fence(int) {}

#define FETCH(bits, type, name)                                                                           \
  extern "C" type __tsan_atomic##bits##_fetch_##name(type *a, type v, int) {                              \
    touch(a, sizeof v, true, locks | atomic_lock, CODE);                                                  \
    return __atomic_fetch_##name(a, v, __ATOMIC_SEQ_CST);                                                 \
  }
#define EXCHANGE(bits, type, name)                                                                        \
  extern "C" int __tsan_atomic##bits##_compare_exchange_##name(type *a, type *e, type v, int, int) {      \
    touch(a, sizeof v, true, locks | atomic_lock, CODE);                                                  \
    return __atomic_compare_exchange_n(a, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
  }
#define ATOMIC(bits, type)                                                                                \
  extern "C" type __tsan_atomic##bits##_load(type *a, int) {                                              \
    touch(a, sizeof *a, false, locks | atomic_lock, CODE);                                                \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                       \
  extern "C" void __tsan_atomic##bits##_store(type *a, type v, int) {                                     \
    touch(a, sizeof v, true, locks | atomic_lock, CODE);                                                  \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                       \
  extern "C" type __tsan_atomic##bits##_exchange(type *a, type v, int) {                                  \
    touch(a, sizeof v, true, locks | atomic_lock, CODE);                                                  \
    return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                       \
  extern "C" type __tsan_atomic##bits##_compare_exchange_val(type *a, type e, type v, int, int) {         \
    touch(a, sizeof v, true, locks | atomic_lock, CODE);                                                  \
    __atomic_compare_exchange_n(a, &e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                     \
    return e;                                                                                             \
  }                                                                                                       \
  EXCHANGE(bits, type, strong)                                                                            \
  EXCHANGE(bits, type, weak)                                                                              \
  FETCH(bits, type, add)                                                                                  \
  FETCH(bits, type, sub)                                                                                  \
  FETCH(bits, type, and)                                                                                  \
  FETCH(bits, type, or)                                                                                   \
  FETCH(bits, type, xor)                                                                                  \
  FETCH(bits, type, nand)
ATOMIC(8, unsigned char)
ATOMIC(16, unsigned short)
ATOMIC(32, unsigned)
ATOMIC(64, unsigned long)
