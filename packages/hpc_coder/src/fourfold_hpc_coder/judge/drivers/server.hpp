// The process in which a candidate runs: it answers requests, and is not trusted.
//
// The judge, another process outside the sandbox, sends inputs, starts the clock, says "go" and stops it at
// the reply; it compares the outputs itself. Nothing here knows what is right, how long anything took, or
// which sizes will come. Every request carries a fresh random token that its reply must repeat, so that a
// program which writes on the channel by itself is found out.
//
// Request: operation (1 byte), token (16), length (8), payload. Reply: token, length, payload.
//   L  load: keep these inputs, ready for a call          G  go: call the candidate once
//   D  dump: send evidence, outputs, and what the other ranks returned
//   Q  quit
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef FOURFOLD_KOKKOS
#include <Kokkos_Core.hpp>
#endif

namespace fourfold {

using Bytes = std::vector<unsigned char>;
using Token = std::array<unsigned char, 16>;

// What a call did, beside its answer; summed over ranks where there are several.
struct Evidence {
  double process_cpu_s = 0;    // processor time of all threads
  double main_cpu_s = 0;       // of the calling thread
  double region_cpu_s = 0;     // of the calling thread inside parallel regions
  double regions = 0;          // parallel regions entered
  double team = 0;             // most threads that entered one region
  double message_cpu_s = 0;    // of the calling thread inside MPI, which waits by spinning
  double team_cpu_s = 0;       // of all threads inside parallel regions
  double busiest_cpu_s = 0;    // of the busiest thread of each region
  double messages = 0;         // calls that move data between ranks
  double talking_ranks = 0;    // ranks that made such a call
  double ranks = 1;
  double working_ranks = 0;    // ranks that computed a twentieth of what the busiest did; counted when summed
};

extern Evidence evidence;                        // of the call under way; reset before each
extern unsigned char fence;                      // see fences.hpp
void start(int *argc, char ***argv);             // runtime systems: MPI, Kokkos
void stop();
int rank();
void share(unsigned char *bytes, std::size_t n); // rank 0's bytes on every rank; who waits, sleeps
void settle();                                   // until every rank is here; who waits, sleeps
void barrier();                                  // the same by the runtime system, which may have work left
Evidence gathered(Evidence mine);                // the sum over ranks, on rank 0
Bytes gathered(const Bytes &mine);               // every rank's in turn, on rank 0; all have as many

inline double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

class Reader {
public:
  explicit Reader(const Bytes &bytes) : at_(bytes.data()) {}
  template <class T> T value() {
    T held;
    std::memcpy(&held, at_, sizeof held);
    at_ += sizeof held;
    return held;
  }
  void copy(void *to, std::size_t n) {
    if (n) std::memcpy(to, at_, n);
    at_ += n;
  }

private:
  const unsigned char *at_;
};

void append(Bytes &bytes, const void *from, std::size_t n);

// How one argument travels: a scalar as its bytes, a container as its length and its elements' bytes.
template <class T> struct Wire {
  static_assert(std::is_trivially_copyable_v<T>);
  static T load(Reader &from) { return from.value<T>(); }
  static void store(Bytes &to, const T &value) { append(to, &value, sizeof value); }
};

template <class T> struct Wire<std::vector<T>> {
  static std::vector<T> load(Reader &from) {
    std::vector<T> values(from.value<std::uint64_t>());
    from.copy(values.data(), values.size() * sizeof(T));
    return values;
  }
  static void store(Bytes &to, const std::vector<T> &values) {
    std::uint64_t n = values.size();
    append(to, &n, sizeof n);
    append(to, values.data(), n * sizeof(T));
  }
};

template <class T, std::size_t N> struct Wire<std::array<T, N>> {
  static std::array<T, N> load(Reader &from) {
    std::array<T, N> values{};
    from.value<std::uint64_t>();
    from.copy(values.data(), sizeof values);
    return values;
  }
  static void store(Bytes &to, const std::array<T, N> &values) {
    std::uint64_t n = N;
    append(to, &n, sizeof n);
    append(to, values.data(), sizeof values);
  }
};

#ifdef FOURFOLD_KOKKOS
template <class T> struct Wire<Kokkos::View<T *>> {
  using Element = std::remove_const_t<T>;
  static Kokkos::View<T *> load(Reader &from) {
    auto n = from.value<std::uint64_t>();
    Kokkos::View<Element *> values("argument", n);
    from.copy(values.data(), n * sizeof(Element));
    return values;
  }
  static void store(Bytes &to, const Kokkos::View<T *> &values) {
    std::uint64_t n = values.extent(0);
    append(to, &n, sizeof n);
    append(to, values.data(), n * sizeof(Element));
  }
};
#endif

template <class P> using Held = std::remove_cv_t<std::remove_reference_t<P>>;

// Outputs are what the function may write: references to something that is not const.
template <class P>
constexpr bool is_output = std::is_lvalue_reference_v<P> && !std::is_const_v<std::remove_reference_t<P>>;

// What the loop in `serve.cc` asks of a driver, whatever the types of its function.
struct Served {
  void (*load)(const Bytes &payload);
  void (*call)();
  void (*returned)(Bytes &bytes);
  void (*dump)(Bytes &bytes);
  void (*drop)();
};

int serve(const Served &served, int argc, char **argv);

// A function with its arguments and its result. Each driver compiles this anew: it holds no more than it must.
template <class Result, class... Parameters> struct Server {
  using Arguments = std::tuple<Held<Parameters>...>;
  static inline Result (*function)(Parameters...) = nullptr;
  static inline Arguments *arguments = nullptr;
  static inline std::conditional_t<std::is_void_v<Result>, char, Result> result{};

  static void load(const Bytes &payload) {
    Reader from(payload);
    auto *loaded = new Arguments{Wire<Held<Parameters>>::load(from)...};
    drop();
    arguments = loaded;
  }
  static void drop() {
    delete arguments;
    arguments = nullptr;
  }
  static void call() {
    auto on = [](auto &...held) {
      if constexpr (std::is_void_v<Result>)
        function(held...);
      else
        result = function(held...);
    };
    std::apply(on, *arguments);
  }
  static void returned(Bytes &bytes) {
    if constexpr (!std::is_void_v<Result>) Wire<Result>::store(bytes, result);
  }
  static void dump(Bytes &bytes) {
    returned(bytes);
    std::apply([&](auto &...held) { (dump_one<Parameters>(bytes, held), ...); }, *arguments);
  }
  template <class P> static void dump_one(Bytes &bytes, Held<P> &held) {
    if constexpr (is_output<P>) Wire<Held<P>>::store(bytes, held);
  }
};

template <class Result, class... Parameters>
int serve(Result (*function)(Parameters...), int argc, char **argv) {
  using Own = Server<Result, Parameters...>;
  Own::function = function;
  return serve({Own::load, Own::call, Own::returned, Own::dump, Own::drop}, argc, argv);
}

} // namespace fourfold
