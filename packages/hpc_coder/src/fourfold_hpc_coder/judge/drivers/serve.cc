// The loop of the process in which a candidate runs, one for all types of functions; see server.hpp.
#include "server.hpp"

#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <optional>
#include <unistd.h>

namespace fourfold {

void append(Bytes &bytes, const void *from, std::size_t n) {
  auto *first = static_cast<const unsigned char *>(from);
  bytes.insert(bytes.end(), first, first + n);
}

namespace {

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

struct Request {
  unsigned char operation;
  Token token;
  std::uint64_t length;
};

} // namespace

int serve(const Served &served, int argc, char **argv) {
  start(&argc, &argv);
  {
    std::optional<Channel> channel;
    if (rank() == 0) channel.emplace(argc > 1 ? argv[1] : "");
    unsigned char sign = 0x41; // fences hold large numbers, in turn positive and negative
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
        fence = sign ^= 0x80;
        served.load(payload);
        fence = 0;
        evidence = Evidence{};
      }
      if (request.operation == 'G') {
        barrier();
        double process_s = seconds(CLOCK_PROCESS_CPUTIME_ID), main_s = seconds(CLOCK_THREAD_CPUTIME_ID);
        served.call();
        evidence.main_cpu_s = seconds(CLOCK_THREAD_CPUTIME_ID) - main_s;
        evidence.process_cpu_s = seconds(CLOCK_PROCESS_CPUTIME_ID) - process_s;
        barrier();
      }
      if (request.operation == 'D') {
        evidence.talking_ranks = evidence.messages > 0;
        Bytes returned;
        served.returned(returned);
        Bytes everywhere = gathered(returned);
        Evidence all = gathered(evidence);
        if (rank() == 0) {
          append(reply, &all, sizeof all);
          served.dump(reply);
          append(reply, everywhere.data() + returned.size(), everywhere.size() - returned.size());
        }
      }
      settle();
      if (rank() == 0) channel->reply(request.token, reply);
    }
    served.drop();
  }
  stop();
  return 0;
}

} // namespace fourfold
