// Several ranks under MPI. Calls that move data between ranks are counted on their way to the library.
#include "fences.hpp"
#include "server.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <mpi.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

namespace fourfold {

Evidence evidence;

namespace {

// Where ranks wait for one another while nothing is called. They are on one machine, so they can sleep; MPI has
// them spin, and the processor time that the judge counts while data are moved would say nothing.
struct Meeting {
  pthread_barrier_t everyone;
  std::array<unsigned char, 1 << 22> window; // through which rank 0's bytes go
  Evidence mine[];                           // of each rank
};

Meeting *meeting = nullptr;
int self = 0, ranks = 1;

void meet() {
  const char *folder = std::getenv("TMPDIR");
  char name[256];
  std::snprintf(name, sizeof name, "%s/fourfold-XXXXXX", folder ? folder : "/tmp");
  std::size_t whole = sizeof(Meeting) + ranks * sizeof(Evidence);
  int file = self == 0 ? mkstemp(name) : -1;
  PMPI_Bcast(name, sizeof name, MPI_CHAR, 0, MPI_COMM_WORLD);
  if (self != 0) file = open(name, O_RDWR | O_CLOEXEC);
  if (file < 0 || ftruncate(file, whole)) _exit(94);
  void *at = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (at == MAP_FAILED) _exit(94);
  close(file);
  meeting = static_cast<Meeting *>(at);
  if (self == 0) {
    pthread_barrierattr_t shared;
    pthread_barrierattr_init(&shared);
    pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&meeting->everyone, &shared, ranks);
  }
  PMPI_Barrier(MPI_COMM_WORLD);
  if (self == 0) unlink(name);
}

} // namespace

void start(int *argc, char ***argv) {
  int provided;
  PMPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
  PMPI_Comm_rank(MPI_COMM_WORLD, &self);
  PMPI_Comm_size(MPI_COMM_WORLD, &ranks);
  meet();
}
void stop() { PMPI_Finalize(); }

int rank() { return self; }

void settle() { pthread_barrier_wait(&meeting->everyone); }

void share(unsigned char *bytes, std::size_t n) {
  auto &window = meeting->window;
  for (std::size_t done = 0; done < n && ranks > 1; done += window.size()) {
    std::size_t part = std::min(window.size(), n - done);
    if (self == 0) std::memcpy(window.data(), bytes + done, part);
    settle();
    if (self != 0) std::memcpy(bytes + done, window.data(), part);
    settle();
  }
}

void barrier() { PMPI_Barrier(MPI_COMM_WORLD); }

Bytes gathered(const Bytes &mine) {
  auto *window = meeting->window.data();
  if (!mine.empty()) std::memcpy(window + self * mine.size(), mine.data(), mine.size());
  settle();
  return Bytes(window, window + ranks * mine.size());
}

Evidence gathered(Evidence mine) {
  constexpr int fields = sizeof(Evidence) / sizeof(double);
  meeting->mine[self] = mine;
  settle();
  Evidence all = meeting->mine[0];
  for (int other = 1; other < ranks; ++other)
    for (int field = 0; field < fields; ++field)
      reinterpret_cast<double *>(&all)[field] += reinterpret_cast<double *>(&meeting->mine[other])[field];
  auto computed_s = [](const Evidence &one) { return one.process_cpu_s - one.message_cpu_s; };
  double most_s = 0;
  for (int one = 0; one < ranks; ++one) most_s = std::max(most_s, computed_s(meeting->mine[one]));
  for (int one = 0; one < ranks; ++one) all.working_ranks += computed_s(meeting->mine[one]) >= most_s / 20;
  return all;
}

} // namespace fourfold

template <class Call> static int timed(Call call) {
  double began_s = fourfold::seconds(CLOCK_THREAD_CPUTIME_ID);
  int code = call();
  fourfold::evidence.message_cpu_s += fourfold::seconds(CLOCK_THREAD_CPUTIME_ID) - began_s;
  return code;
}

// One definition per call: the name, its parameters, and the arguments passed on. A zero count moves nothing.
#define COUNTED(name, parameters, arguments)                                                              \
  extern "C" int MPI_##name parameters {                                                                  \
    fourfold::evidence.messages += 1;                                                                     \
    return timed([&] { return PMPI_##name arguments; });                                                  \
  }
// The same without the count, for calls that only wait.
#define WAITED(name, parameters, arguments)                                                               \
  extern "C" int MPI_##name parameters {                                                                  \
    return timed([&] { return PMPI_##name arguments; });                                                  \
  }
#define BUFFER const void *from, void *to
#define KIND MPI_Datatype kind

COUNTED(Send, (const void *b, int n, KIND, int r, int t, MPI_Comm c), (b, n, kind, r, t, c))
COUNTED(Ssend, (const void *b, int n, KIND, int r, int t, MPI_Comm c), (b, n, kind, r, t, c))
COUNTED(Bsend, (const void *b, int n, KIND, int r, int t, MPI_Comm c), (b, n, kind, r, t, c))
COUNTED(Rsend, (const void *b, int n, KIND, int r, int t, MPI_Comm c), (b, n, kind, r, t, c))
COUNTED(Isend, (const void *b, int n, KIND, int r, int t, MPI_Comm c, MPI_Request *q), (b, n, kind, r, t, c, q))
COUNTED(Recv, (void *b, int n, KIND, int r, int t, MPI_Comm c, MPI_Status *s), (b, n, kind, r, t, c, s))
COUNTED(Irecv, (void *b, int n, KIND, int r, int t, MPI_Comm c, MPI_Request *q), (b, n, kind, r, t, c, q))
COUNTED(Sendrecv,
        (const void *b, int n, KIND, int r, int t, void *b2, int n2, MPI_Datatype k2, int r2, int t2,
         MPI_Comm c, MPI_Status *s),
        (b, n, kind, r, t, b2, n2, k2, r2, t2, c, s))
COUNTED(Bcast, (void *b, int n, KIND, int root, MPI_Comm c), (b, n, kind, root, c))
COUNTED(Ibcast, (void *b, int n, KIND, int root, MPI_Comm c, MPI_Request *q), (b, n, kind, root, c, q))
COUNTED(Reduce, (BUFFER, int n, KIND, MPI_Op o, int root, MPI_Comm c), (from, to, n, kind, o, root, c))
COUNTED(Allreduce, (BUFFER, int n, KIND, MPI_Op o, MPI_Comm c), (from, to, n, kind, o, c))
COUNTED(Iallreduce, (BUFFER, int n, KIND, MPI_Op o, MPI_Comm c, MPI_Request *q), (from, to, n, kind, o, c, q))
COUNTED(Scan, (BUFFER, int n, KIND, MPI_Op o, MPI_Comm c), (from, to, n, kind, o, c))
COUNTED(Exscan, (BUFFER, int n, KIND, MPI_Op o, MPI_Comm c), (from, to, n, kind, o, c))
COUNTED(Reduce_scatter, (BUFFER, const int n[], KIND, MPI_Op o, MPI_Comm c), (from, to, n, kind, o, c))
COUNTED(Reduce_scatter_block, (BUFFER, int n, KIND, MPI_Op o, MPI_Comm c), (from, to, n, kind, o, c))
COUNTED(Gather, (const void *b, int n, KIND, void *to, int m, MPI_Datatype k2, int root, MPI_Comm c),
        (b, n, kind, to, m, k2, root, c))
COUNTED(Gatherv,
        (const void *b, int n, KIND, void *to, const int m[], const int d[], MPI_Datatype k2, int root,
         MPI_Comm c),
        (b, n, kind, to, m, d, k2, root, c))
COUNTED(Allgather, (const void *b, int n, KIND, void *to, int m, MPI_Datatype k2, MPI_Comm c),
        (b, n, kind, to, m, k2, c))
COUNTED(Allgatherv,
        (const void *b, int n, KIND, void *to, const int m[], const int d[], MPI_Datatype k2, MPI_Comm c),
        (b, n, kind, to, m, d, k2, c))
COUNTED(Scatter, (const void *b, int n, KIND, void *to, int m, MPI_Datatype k2, int root, MPI_Comm c),
        (b, n, kind, to, m, k2, root, c))
COUNTED(Scatterv,
        (const void *b, const int n[], const int d[], KIND, void *to, int m, MPI_Datatype k2, int root,
         MPI_Comm c),
        (b, n, d, kind, to, m, k2, root, c))
COUNTED(Alltoall, (const void *b, int n, KIND, void *to, int m, MPI_Datatype k2, MPI_Comm c),
        (b, n, kind, to, m, k2, c))
COUNTED(Alltoallv,
        (const void *b, const int n[], const int d[], KIND, void *to, const int m[], const int e[],
         MPI_Datatype k2, MPI_Comm c),
        (b, n, d, kind, to, m, e, k2, c))
COUNTED(Put,
        (const void *b, int n, KIND, int r, MPI_Aint at, int m, MPI_Datatype k2, MPI_Win w),
        (b, n, kind, r, at, m, k2, w))
COUNTED(Get, (void *b, int n, KIND, int r, MPI_Aint at, int m, MPI_Datatype k2, MPI_Win w),
        (b, n, kind, r, at, m, k2, w))
COUNTED(Accumulate,
        (const void *b, int n, KIND, int r, MPI_Aint at, int m, MPI_Datatype k2, MPI_Op o, MPI_Win w),
        (b, n, kind, r, at, m, k2, o, w))

COUNTED(Issend, (const void *b, int n, KIND, int r, int t, MPI_Comm c, MPI_Request *q), (b, n, kind, r, t, c, q))
COUNTED(Ibsend, (const void *b, int n, KIND, int r, int t, MPI_Comm c, MPI_Request *q), (b, n, kind, r, t, c, q))
COUNTED(Irsend, (const void *b, int n, KIND, int r, int t, MPI_Comm c, MPI_Request *q), (b, n, kind, r, t, c, q))
COUNTED(Mrecv, (void *b, int n, KIND, MPI_Message *m, MPI_Status *s), (b, n, kind, m, s))
COUNTED(Imrecv, (void *b, int n, KIND, MPI_Message *m, MPI_Request *q), (b, n, kind, m, q))
COUNTED(Start, (MPI_Request * q), (q))
COUNTED(Startall, (int n, MPI_Request q[]), (n, q))
COUNTED(Sendrecv_replace, (void *b, int n, KIND, int r, int t, int r2, int t2, MPI_Comm c, MPI_Status *s),
        (b, n, kind, r, t, r2, t2, c, s))
COUNTED(Ireduce, (BUFFER, int n, KIND, MPI_Op o, int root, MPI_Comm c, MPI_Request *q),
        (from, to, n, kind, o, root, c, q))
COUNTED(Iscan, (BUFFER, int n, KIND, MPI_Op o, MPI_Comm c, MPI_Request *q), (from, to, n, kind, o, c, q))
COUNTED(Iexscan, (BUFFER, int n, KIND, MPI_Op o, MPI_Comm c, MPI_Request *q), (from, to, n, kind, o, c, q))
COUNTED(Ireduce_scatter, (BUFFER, const int n[], KIND, MPI_Op o, MPI_Comm c, MPI_Request *q),
        (from, to, n, kind, o, c, q))
COUNTED(Ireduce_scatter_block, (BUFFER, int n, KIND, MPI_Op o, MPI_Comm c, MPI_Request *q),
        (from, to, n, kind, o, c, q))
COUNTED(Igather,
        (const void *b, int n, KIND, void *to, int m, MPI_Datatype k2, int root, MPI_Comm c, MPI_Request *q),
        (b, n, kind, to, m, k2, root, c, q))
COUNTED(Igatherv,
        (const void *b, int n, KIND, void *to, const int m[], const int d[], MPI_Datatype k2, int root,
         MPI_Comm c, MPI_Request *q),
        (b, n, kind, to, m, d, k2, root, c, q))
COUNTED(Iallgather,
        (const void *b, int n, KIND, void *to, int m, MPI_Datatype k2, MPI_Comm c, MPI_Request *q),
        (b, n, kind, to, m, k2, c, q))
COUNTED(Iallgatherv,
        (const void *b, int n, KIND, void *to, const int m[], const int d[], MPI_Datatype k2, MPI_Comm c,
         MPI_Request *q),
        (b, n, kind, to, m, d, k2, c, q))
COUNTED(Iscatter,
        (const void *b, int n, KIND, void *to, int m, MPI_Datatype k2, int root, MPI_Comm c, MPI_Request *q),
        (b, n, kind, to, m, k2, root, c, q))
COUNTED(Iscatterv,
        (const void *b, const int n[], const int d[], KIND, void *to, int m, MPI_Datatype k2, int root,
         MPI_Comm c, MPI_Request *q),
        (b, n, d, kind, to, m, k2, root, c, q))
COUNTED(Ialltoall,
        (const void *b, int n, KIND, void *to, int m, MPI_Datatype k2, MPI_Comm c, MPI_Request *q),
        (b, n, kind, to, m, k2, c, q))
COUNTED(Ialltoallv,
        (const void *b, const int n[], const int d[], KIND, void *to, const int m[], const int e[],
         MPI_Datatype k2, MPI_Comm c, MPI_Request *q),
        (b, n, d, kind, to, m, e, k2, c, q))
COUNTED(Alltoallw,
        (const void *b, const int n[], const int d[], const MPI_Datatype k[], void *to, const int m[],
         const int e[], const MPI_Datatype k2[], MPI_Comm c),
        (b, n, d, k, to, m, e, k2, c))
COUNTED(Neighbor_allgather,
        (const void *b, int n, KIND, void *to, int m, MPI_Datatype k2, MPI_Comm c), (b, n, kind, to, m, k2, c))
COUNTED(Neighbor_alltoall,
        (const void *b, int n, KIND, void *to, int m, MPI_Datatype k2, MPI_Comm c), (b, n, kind, to, m, k2, c))
COUNTED(Rput,
        (const void *b, int n, KIND, int r, MPI_Aint at, int m, MPI_Datatype k2, MPI_Win w, MPI_Request *q),
        (b, n, kind, r, at, m, k2, w, q))
COUNTED(Rget, (void *b, int n, KIND, int r, MPI_Aint at, int m, MPI_Datatype k2, MPI_Win w, MPI_Request *q),
        (b, n, kind, r, at, m, k2, w, q))
COUNTED(Raccumulate,
        (const void *b, int n, KIND, int r, MPI_Aint at, int m, MPI_Datatype k2, MPI_Op o, MPI_Win w,
         MPI_Request *q),
        (b, n, kind, r, at, m, k2, o, w, q))
COUNTED(Get_accumulate,
        (const void *b, int n, KIND, void *to, int l, MPI_Datatype k2, int r, MPI_Aint at, int m,
         MPI_Datatype k3, MPI_Op o, MPI_Win w),
        (b, n, kind, to, l, k2, r, at, m, k3, o, w))
COUNTED(Fetch_and_op, (BUFFER, KIND, int r, MPI_Aint at, MPI_Op o, MPI_Win w), (from, to, kind, r, at, o, w))
COUNTED(Compare_and_swap,
        (const void *from, const void *than, void *old, KIND, int r, MPI_Aint at, MPI_Win w),
        (from, than, old, kind, r, at, w))
// Memory that ranks share is read without a call.
COUNTED(Win_shared_query, (MPI_Win w, int r, MPI_Aint *n, int *unit, void *at), (w, r, n, unit, at))

WAITED(Barrier, (MPI_Comm c), (c))
WAITED(Wait, (MPI_Request * q, MPI_Status *s), (q, s))
WAITED(Waitall, (int n, MPI_Request q[], MPI_Status s[]), (n, q, s))
WAITED(Waitany, (int n, MPI_Request q[], int *i, MPI_Status *s), (n, q, i, s))
WAITED(Waitsome, (int n, MPI_Request q[], int *m, int i[], MPI_Status s[]), (n, q, m, i, s))
WAITED(Test, (MPI_Request * q, int *done, MPI_Status *s), (q, done, s))
WAITED(Testall, (int n, MPI_Request q[], int *done, MPI_Status s[]), (n, q, done, s))
WAITED(Probe, (int r, int t, MPI_Comm c, MPI_Status *s), (r, t, c, s))
WAITED(Iprobe, (int r, int t, MPI_Comm c, int *is, MPI_Status *s), (r, t, c, is, s))
WAITED(Win_fence, (int how, MPI_Win w), (how, w))

// The judge starts and ends MPI, as every caller of an answer does; either is an error a second time.
static int again(const char *call) {
  std::fprintf(stderr, "it calls %s, which its caller has done or will do: MPI allows it once\n", call);
  std::abort();
}
extern "C" int MPI_Init(int *, char ***) { return again("MPI_Init"); }
extern "C" int MPI_Init_thread(int *, char ***, int, int *) { return again("MPI_Init_thread"); }
extern "C" int MPI_Finalize() { return again("MPI_Finalize"); }
