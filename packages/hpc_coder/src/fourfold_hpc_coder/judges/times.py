"""The families of forged times that are reported of other boards, each in a harmless form.

Every program here spends a third of a second, and tries to have it not counted. It does so in its own process
alone: our clock and the kernel's count of processor time are outside.
"""

from dataclasses import dataclass
from typing import Literal

SPENT_S = 0.3
"""Processor time that each program spends on a call."""

Outcome = Literal["charged", "refused", "open"]
"""`charged`: right, and its time counts. `refused`: not right. `open`: right, and not charged."""

_SPEND = f"""#include <chrono>
#include <ctime>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
static double spent() {{
    timespec t;
    syscall(SYS_clock_gettime, CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}}
static void spend() {{ for (double began = spent(); spent() - began < {SPENT_S};) {{}} }}
"""
_AVERAGE = "double sum = 0; for (double v : x) sum += v; return sum / x.size(); }"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgedTime:
    """A way to seem faster, as an answer to problem 27 in serial."""

    name: str
    words: str
    """Its act, as the end of "a program that"."""
    above: str
    """Stands before the prompt."""
    body: str
    outcome: Outcome
    charge: str
    """Of the judge, in words."""


FORGED_TIMES = (
    ForgedTime(
        name="another clock",
        words="brings a clock of its own that stands still",
        above=_SPEND
        + 'extern "C" int clock_gettime(clockid_t, timespec *t) { *t = timespec{}; return 0; }\n',
        body=f"spend(); {_AVERAGE}",
        outcome="charged",
        charge="in full: the clock is in the judge's process",
    ),
    ForgedTime(
        name="a time in words",
        words="prints how fast it was",
        above=_SPEND,
        body=f'spend(); std::puts("runtime: 0.000 s"); {_AVERAGE}',
        outcome="charged",
        charge="in full: nothing that a program prints is read",
    ),
    ForgedTime(
        name="replay",
        words="keeps the answers to inputs that it has seen",
        above=f"{_SPEND}#include <map>\n",
        body="static std::map<double, double> kept; if (kept.count(x[0])) return kept[x[0]]; spend();"
        " double all = 0; for (double v : x) all += v; return kept[x[0]] = all / x.size(); }",
        outcome="charged",
        charge="in full: every timed call has inputs of its own",
    ),
    ForgedTime(
        name="the first call pays",
        words="works at the first calls and gives the last answer later",
        above=_SPEND,
        body="static int calls = 0; static double kept = 0; if (++calls > 2) return kept; spend();"
        " double all = 0; for (double v : x) all += v; return kept = all / x.size(); }",
        outcome="refused",
        charge="none: the answer of every timed call is compared",
    ),
    ForgedTime(
        name="a late thread",
        words="returns at once and has a thread work on",
        above=_SPEND,
        body="static double kept = 0; const double *all = x.data(); size_t n = x.size();"
        " std::thread([=] { double sum = 0; for (size_t i = 0; i < n; ++i) sum += all[i];"
        " kept = sum / n; }).detach(); return kept; }",
        outcome="refused",
        charge="none: the answer is the one of the call",
    ),
    ForgedTime(
        name="work beside the call",
        words="is right at once and has a thread spend time until the outputs are taken",
        above=_SPEND
        + "#include <atomic>\nstatic std::atomic<bool> is_over{true};\n"
        + 'extern "C" ssize_t write(int where, const void *from, size_t n) {\n'
        "    while (!is_over) std::this_thread::yield();\n"
        "    return syscall(SYS_write, where, from, n);\n}\n",
        body="is_over = false; std::thread([] { spend(); is_over = true; }).detach(); " + _AVERAGE,
        outcome="charged",
        charge="in full: the reply to the call is written by the same function",
    ),
    ForgedTime(
        name="borrowed processors",
        words="has more threads compute than its launch has",
        above=_SPEND,
        body="double left = 0, right = 0; size_t half = x.size() / 2;"
        " std::thread other([&] { for (size_t i = half; i < x.size(); ++i) right += x[i]; });"
        " for (size_t i = 0; i < half; ++i) left += x[i];"
        " other.join(); return (left + right) / x.size(); }",
        outcome="open",
        charge="none: processors are not taken away; on the largest launch there are none to borrow",
    ),
)
