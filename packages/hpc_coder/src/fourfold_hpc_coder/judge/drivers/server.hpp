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
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <optional>
#include <tuple>
#include <type_traits>
#include <unistd.h>
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

class Channel {
public:
  // In this order: once the judge can write requests, it removes both names.
  explicit Channel(const char *folder)
      : out_(opened(folder, "replies", O_WRONLY)), in_(opened(folder, "requests", O_RDONLY)) {
    if (in_ < 0 || out_ < 0) _exit(91);
  }
  void read(void *to, std::size_t n) {
    for (auto *at = static_cast<unsigned char *>(to); n;) {
      ssize_t got = ::read(in_, at, n);
      if (got <= 0) _exit(92);
      at += got;
      n -= got;
    }
  }
  void write(const void *from, std::size_t n) {
    for (auto *at = static_cast<const unsigned char *>(from); n;) {
      ssize_t put = ::write(out_, at, n);
      if (put <= 0) _exit(93);
      at += put;
      n -= put;
    }
  }
  void reply(const Token &token, const Bytes &payload) {
    std::uint64_t length = payload.size();
    write(token.data(), token.size());
    write(&length, sizeof length);
    write(payload.data(), payload.size());
  }

private:
  static int opened(const char *folder, const char *name, int flags) {
    char path[256];
    std::snprintf(path, sizeof path, "%s%s", folder, name);
    return open(path, flags | O_CLOEXEC);
  }
  int out_, in_;
};

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

inline void append(Bytes &bytes, const void *from, std::size_t n) {
  auto *first = static_cast<const unsigned char *>(from);
  bytes.insert(bytes.end(), first, first + n);
}

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

template <class Result, class... Parameters> class Server {
public:
  using Function = Result (*)(Parameters...);

  explicit Server(Function function) : function_(function) {}

  void load(const Bytes &payload) {
    Reader from(payload);
    fence = sign_ ^= 0x80;
    arguments_.emplace(std::tuple<Held<Parameters>...>{Wire<Held<Parameters>>::load(from)...});
    fence = 0;
  }

  void call() { call(std::index_sequence_for<Parameters...>{}); }

  void returned(Bytes &bytes) {
    if constexpr (!std::is_void_v<Result>) Wire<Result>::store(bytes, result_);
  }

  void dump(Bytes &bytes) {
    returned(bytes);
    dump(bytes, std::index_sequence_for<Parameters...>{});
  }

private:
  template <std::size_t... I> void call(std::index_sequence<I...>) {
    if constexpr (std::is_void_v<Result>)
      function_(std::get<I>(*arguments_)...);
    else
      result_ = function_(std::get<I>(*arguments_)...);
  }
  template <std::size_t... I> void dump(Bytes &bytes, std::index_sequence<I...>) {
    (dump_one<Parameters, I>(bytes), ...);
  }
  template <class P, std::size_t I> void dump_one(Bytes &bytes) {
    if constexpr (is_output<P>) Wire<Held<P>>::store(bytes, std::get<I>(*arguments_));
  }

  Function function_;
  unsigned char sign_ = 0x41; // fences hold large numbers, in turn positive and negative
  std::optional<std::tuple<Held<Parameters>...>> arguments_;
  std::conditional_t<std::is_void_v<Result>, char, Result> result_{};
};

struct Request {
  unsigned char operation;
  Token token;
  std::uint64_t length;
};

template <class Result, class... Parameters>
int serve(Result (*function)(Parameters...), int argc, char **argv) {
  start(&argc, &argv);
  {
    std::optional<Channel> channel;
    if (rank() == 0) channel.emplace(argc > 1 ? argv[1] : "");
    Server<Result, Parameters...> server(function);
    Bytes payload, reply; // kept, as their memory is
    for (;;) {
      Request request{};
      if (rank() == 0) {
        channel->read(&request.operation, 1);
        channel->read(request.token.data(), request.token.size());
        channel->read(&request.length, sizeof request.length);
      }
      share(reinterpret_cast<unsigned char *>(&request), sizeof request);
      payload.resize(request.length);
      if (rank() == 0) channel->read(payload.data(), payload.size());
      share(payload.data(), payload.size());
      reply.clear();
      if (request.operation == 'Q') break;
      if (request.operation == 'L') {
        server.load(payload);
        evidence = Evidence{};
      }
      if (request.operation == 'G') {
        barrier();
        double process_s = seconds(CLOCK_PROCESS_CPUTIME_ID), main_s = seconds(CLOCK_THREAD_CPUTIME_ID);
        server.call();
        evidence.main_cpu_s = seconds(CLOCK_THREAD_CPUTIME_ID) - main_s;
        evidence.process_cpu_s = seconds(CLOCK_PROCESS_CPUTIME_ID) - process_s;
        barrier();
      }
      if (request.operation == 'D') {
        evidence.talking_ranks = evidence.messages > 0;
        Bytes returned;
        server.returned(returned);
        Bytes everywhere = gathered(returned);
        Evidence all = gathered(evidence);
        if (rank() == 0) {
          append(reply, &all, sizeof all);
          server.dump(reply);
          append(reply, everywhere.data() + returned.size(), everywhere.size() - returned.size());
        }
      }
      settle();
      if (rank() == 0) channel->reply(request.token, reply);
    }
  }
  stop();
  return 0;
}

} // namespace fourfold
