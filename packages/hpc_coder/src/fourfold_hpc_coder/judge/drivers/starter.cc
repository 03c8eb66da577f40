// Starts the ranks of an MPI program where there are no sockets, and is the library by which they find each other.
//
// As a program it starts so many processes of a command, and ends with the first of them that ends badly; the
// sandbox then ends the others. mpirun does the same through sockets. As a library it has the calls of PMI-1, by
// which Open MPI's component for the launcher Flux asks for its rank and exchanges addresses: here through a file
// without a name that all ranks map.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <pthread.h>
#include <string>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

constexpr int name_bytes = 64, key_bytes = 256, value_bytes = 1024, most = 1 << 12;

struct Pair {
  char key[key_bytes];
  char value[value_bytes];
};

// What the ranks share: a file whose unwritten parts take no memory.
struct Board {
  int ranks;
  pthread_barrier_t everyone;
  pthread_mutex_t one;
  std::atomic<int> ended; // by the library's last call, as a rank must
  int pairs;
  Pair pair[most];
};

Board *board = nullptr;
int self = 0;

Board *mapped(int file) {
  void *at = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return at == MAP_FAILED ? nullptr : static_cast<Board *>(at);
}

int number(const char *name) {
  const char *text = std::getenv(name);
  return text ? std::atoi(text) : -1;
}

int copied(char *to, const char *from, int length) {
  if (static_cast<int>(std::strlen(from)) >= length) return -1;
  std::strcpy(to, from);
  return 0;
}

} // namespace

extern "C" {

int PMI_Init(int *spawned) {
  *spawned = 0;
  self = number("FOURFOLD_RANK");
  board = mapped(number("FOURFOLD_BOARD"));
  return board && self >= 0 ? 0 : -1;
}
int PMI_Initialized(int *is) { return *is = board != nullptr, 0; }
int PMI_Finalize() { return ++board->ended, 0; }
int PMI_Abort(int code, const char *) { _exit(code ? code : 1); }
int PMI_Get_rank(int *rank) { return *rank = self, 0; }
int PMI_Get_size(int *size) { return *size = board->ranks, 0; }
int PMI_Get_universe_size(int *size) { return PMI_Get_size(size); }
int PMI_Get_clique_size(int *size) { return PMI_Get_size(size); }
int PMI_Get_clique_ranks(int *ranks, int length) {
  for (int rank = 0; rank < length; ++rank) ranks[rank] = rank;
  return 0;
}
int PMI_Get_appnum(int *number) { return *number = 0, 0; }
int PMI_KVS_Get_my_name(char *name, int length) { return copied(name, "fourfold", length); }
int PMI_KVS_Get_name_length_max(int *length) { return *length = name_bytes, 0; }
int PMI_KVS_Get_key_length_max(int *length) { return *length = key_bytes, 0; }
int PMI_KVS_Get_value_length_max(int *length) { return *length = value_bytes, 0; }
int PMI_KVS_Commit(const char *) { return 0; }
int PMI_Barrier() {
  pthread_barrier_wait(&board->everyone);
  return 0;
}
int PMI_KVS_Put(const char *, const char *key, const char *value) {
  pthread_mutex_lock(&board->one);
  int code = -1;
  if (board->pairs < most) {
    Pair &free = board->pair[board->pairs];
    code = copied(free.key, key, key_bytes) || copied(free.value, value, value_bytes) ? -1 : 0;
    board->pairs += !code;
  }
  pthread_mutex_unlock(&board->one);
  return code;
}
int PMI_KVS_Get(const char *, const char *key, char *value, int length) {
  pthread_mutex_lock(&board->one);
  Pair *end = board->pair + board->pairs;
  Pair *held = std::find_if(board->pair, end, [&](Pair &pair) { return !std::strcmp(pair.key, key); });
  int code = held == end ? -1 : copied(value, held->value, length);
  pthread_mutex_unlock(&board->one);
  return code;
}
}

int main(int count, char **words) {
  if (count < 4) return 2;
  int ranks = std::atoi(words[1]);
  const char *folder = std::getenv("TMPDIR");
  std::string name = std::string(folder ? folder : "/tmp") + "/ranks-XXXXXX";
  int file = mkstemp(name.data());
  if (ranks < 1 || file < 0 || ftruncate(file, sizeof(Board)) || unlink(name.c_str()) || !(board = mapped(file))) {
    std::perror("ranks");
    return 2;
  }
  board->ranks = ranks;
  pthread_barrierattr_t among;
  pthread_barrierattr_init(&among);
  pthread_barrierattr_setpshared(&among, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&board->everyone, &among, ranks);
  pthread_mutexattr_t shared;
  pthread_mutexattr_init(&shared);
  pthread_mutexattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
  pthread_mutex_init(&board->one, &shared);
  setenv("FOURFOLD_BOARD", std::to_string(file).c_str(), 1);
  setenv("FLUX_JOB_ID", "1", 1);
  setenv("FLUX_PMI_LIBRARY_PATH", words[2], 1);
  for (int rank = 0; rank < ranks; ++rank) {
    pid_t child = fork();
    if (child < 0) {
      std::perror("ranks");
      return 2;
    }
    if (!child) {
      setenv("FOURFOLD_RANK", std::to_string(rank).c_str(), 1);
      execvp(words[3], words + 3);
      std::perror(words[3]);
      _exit(127);
    }
  }
  int status;
  for (int gone = 1; wait(&status) > 0; ++gone) {
    if (status) return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    if (board->ended < gone) return 1; // it left without a word: the others would wait for it
  }
}
