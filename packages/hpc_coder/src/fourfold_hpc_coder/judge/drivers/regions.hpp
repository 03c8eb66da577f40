// GCC's calls into a parallel region, sent by the linker (--wrap) through `watch`, which enters the region.
#pragma once

using Body = void (*)(void *);

// A function that is called before it ends; std::function's header takes longer to compile than all of this.
class Enter {
public:
  template <class Function>
  Enter(const Function &function)
      : function_(&function), call_([](const void *called, Body body, void *data) {
          (*static_cast<const Function *>(called))(body, data);
        }) {}
  void operator()(Body body, void *data) const { call_(function_, body, data); }

private:
  const void *function_;
  void (*call_)(const void *, Body, void *);
};

void watch(Body body, void *data, const Enter &enter);

#define REGION(name)                                                                                      \
  extern "C" void __real_##name(Body, void *, unsigned, unsigned);                                        \
  extern "C" void __wrap_##name(Body body, void *data, unsigned threads, unsigned flags) {                \
    watch(body, data, [=](Body b, void *d) { __real_##name(b, d, threads, flags); });                     \
  }
#define SECTIONS(name)                                                                                    \
  extern "C" void __real_##name(Body, void *, unsigned, unsigned, unsigned);                              \
  extern "C" void __wrap_##name(Body body, void *data, unsigned threads, unsigned count, unsigned flags) { \
    watch(body, data, [=](Body b, void *d) { __real_##name(b, d, threads, count, flags); });              \
  }
#define LOOP(name)                                                                                        \
  extern "C" void __real_##name(Body, void *, unsigned, long, long, long, long, unsigned);                \
  extern "C" void __wrap_##name(Body body, void *data, unsigned threads, long first, long last,           \
                                long step, long chunk, unsigned flags) {                                  \
    watch(body, data,                                                                                     \
          [=](Body b, void *d) { __real_##name(b, d, threads, first, last, step, chunk, flags); });       \
  }
#define RUNTIME_LOOP(name)                                                                                \
  extern "C" void __real_##name(Body, void *, unsigned, long, long, long, unsigned);                      \
  extern "C" void __wrap_##name(Body body, void *data, unsigned threads, long first, long last,           \
                                long step, unsigned flags) {                                              \
    watch(body, data,                                                                                     \
          [=](Body b, void *d) { __real_##name(b, d, threads, first, last, step, flags); });              \
  }

REGION(GOMP_parallel)
SECTIONS(GOMP_parallel_sections)
LOOP(GOMP_parallel_loop_static)
LOOP(GOMP_parallel_loop_dynamic)
LOOP(GOMP_parallel_loop_guided)
LOOP(GOMP_parallel_loop_nonmonotonic_dynamic)
LOOP(GOMP_parallel_loop_nonmonotonic_guided)
RUNTIME_LOOP(GOMP_parallel_loop_runtime)
RUNTIME_LOOP(GOMP_parallel_loop_nonmonotonic_runtime)
RUNTIME_LOOP(GOMP_parallel_loop_maybe_nonmonotonic_runtime)

extern "C" unsigned __real_GOMP_parallel_reductions(Body, void *, unsigned, unsigned);
extern "C" unsigned __wrap_GOMP_parallel_reductions(Body body, void *data, unsigned threads, unsigned flags) {
  unsigned team = 0;
  watch(body, data, [&](Body b, void *d) { team = __real_GOMP_parallel_reductions(b, d, threads, flags); });
  return team;
}
