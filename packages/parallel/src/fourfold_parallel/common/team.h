// A call whose units are shared out among the threads of an OpenMP team that somebody else runs.
#ifndef FOURFOLD_TEAM_H
#define FOURFOLD_TEAM_H

#include <cstdint>

namespace {

// Mirrored in native.py.
struct Team {
    void (*work)(const void* call, int64_t from, int64_t until);
    const void* call;
    int64_t units;
    int (*thread)();  // of the team's runtime: which thread this is, and of how many
    int (*threads)();
};

}  // namespace

extern "C" inline __attribute__((used)) void fourfold_part(const void* shared) {
    const Team& team = *static_cast<const Team*>(shared);
    const int64_t thread = team.thread(), threads = team.threads();
    const int64_t from = team.units * thread / threads, until = team.units * (thread + 1) / threads;
    if (from < until) team.work(team.call, from, until);
}

#endif
