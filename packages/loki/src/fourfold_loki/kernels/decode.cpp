// One decoded token on a CPU: rank pages by the leading coordinates, then read only the best.
//
// Every number of the cache is read at most once, as float32 whatever it is stored in. The heads of a group share
// each read. `native.py` compiles this file for the processor that it runs on; the arithmetic is that of `cpu.py`,
// which is also what runs without a compiler. How much is computed at a time follows from LANES and SUMS of
// `vectors.h`, that is from the instruction set.
#include "fourfold/team.h"
#include "fourfold/vectors.h"

#include <functional>
#include <vector>

namespace {

constexpr int64_t TILE = 64;  // tokens whose leading coordinates lie together; the cache's room is a multiple of it
constexpr int64_t HEADS = 4;  // query heads whose sums are held in registers together
constexpr int64_t AHEAD = 4096;  // bytes of chosen pages that are on their way while others are computed with
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Mirrored in native.py.
struct Sizes {
    int64_t group, head_width, value_width, width, room, length, pages, page, sinks, window, parts;

    int64_t filled() const { return (length + page - 1) / page; }
};

struct Call {
    const float* queries;
    const void *keys, *values, *leading;
    float *output, *logs;  // of each unit
    Sizes sizes;
    int64_t is_bfloat16;
};

// Heads of a group as many as fill a fold of lanes evenly.
constexpr int64_t padded(int64_t count) { return count == 3 ? 4 : count; }

// scores[head][t] = q[head][:width] . leading[:width][t], for the tokens of one tile.
template <typename T, int64_t COUNT>
void score_tile(const float* queries, const T* tile, const Sizes& s, float* scores) {
    constexpr int64_t PARTS = std::min(SUMS / padded(COUNT), TILE / LANES);
    for (int64_t first = 0; first < TILE; first += PARTS * LANES) {
        Lanes total[COUNT][PARTS] = {};
        const T* row = tile + first;
        for (int64_t c = 0; c < s.width; ++c, row += TILE) {
            if (!first) fetch(row + s.width * TILE, TILE * sizeof(T));
            Lanes keys[PARTS];
#pragma GCC unroll 16
            for (int64_t part = 0; part < PARTS; ++part) keys[part] = load(row + part * LANES);
#pragma GCC unroll 4
            for (int64_t head = 0; head < COUNT; ++head) {
                const float query = queries[head * s.head_width + c];
#pragma GCC unroll 16
                for (int64_t part = 0; part < PARTS; ++part) total[head][part] += query * keys[part];
            }
        }
#pragma GCC unroll 4
        for (int64_t head = 0; head < COUNT; ++head)
#pragma GCC unroll 16
            for (int64_t part = 0; part < PARTS; ++part)
                store(scores + head * TILE + first + part * LANES, total[head][part]);
    }
}

// best[page]: the largest score of each page that a tile's tokens first .. first + held - 1 lie in.
void pool(const float* scores, const Sizes& s, int64_t first, int64_t held, float* best) {
    if (TILE % s.page == 0 && s.page % LANES == 0 && held == TILE) {
        for (int64_t from = 0, page = first / s.page; from < TILE; from += s.page, ++page) {
            Lanes most = load(scores + from);
            for (int64_t t = LANES; t < s.page; t += LANES) most = larger(load(scores + from + t), most);
            best[page] = across<larger>(most)[0];
        }
        return;
    }
    for (int64_t from = 0; from < held;) {
        const int64_t page = (first + from) / s.page;
        const int64_t until = std::min(held, (page + 1) * s.page - first);
        float most = best[page];
        for (; from < until; ++from) most = std::max(most, scores[from]);
        best[page] = most;
    }
}

// A group of heads, HEADS at a time; `Call::run<COUNT>(first)` is compiled for each number of them.
template <typename Call>
inline void by_heads(int64_t group, const Call& call) {
    for (int64_t first = 0; first < group; first += HEADS) switch (std::min(HEADS, group - first)) {
            case 1: call.template operator()<1>(first); break;
            case 2: call.template operator()<2>(first); break;
            case 3: call.template operator()<3>(first); break;
            default: call.template operator()<HEADS>(first);
        }
}

// best[head][page], in one sweep over the leading coordinates. `stride` pages a head.
template <typename T>
void rank_heads(const float* queries, const T* leading, const Sizes& s, int64_t stride, float* best) {
    std::fill(best, best + s.group * stride, NEVER);
    alignas(LINE) float scores[HEADS * TILE];
    for (int64_t first = 0; first < s.length; first += TILE) {
        const T* tile = leading + first * s.width;
        const int64_t held = std::min(TILE, s.length - first);
        by_heads(s.group, [&]<int64_t COUNT>(int64_t head) {
            score_tile<T, COUNT>(queries + head * s.head_width, tile, s, scores);
            for (int64_t i = 0; i < COUNT; ++i)
                pool(scores + i * TILE, s, first, held, best + (head + i) * stride);
        });
    }
}

// Sum over the group of each head's weights, in double, where no weight that could matter vanishes.
std::vector<double> rank(const float* best, const Sizes& s, int64_t stride) {
    constexpr int64_t STEP = LANES / 2;
    const int64_t filled = s.filled();
    std::vector<double> ranked(stride);
    if (s.group == 1) std::copy(best, best + filled, ranked.begin());
    std::vector<double> weights(stride);
    for (int64_t head = 0; head < s.group && s.group > 1; ++head) {
        const float* scores = best + head * stride;
        Lanes tops = load(scores);
        for (int64_t i = LANES; i < stride; i += LANES) tops = larger(load(scores + i), tops);
        const double most = across<larger>(tops)[0];
        Doubles total = {};
        for (int64_t i = 0; i < stride; i += STEP) {  // beyond the last page lies NEVER, which weighs nothing
            SomeLanes some;
            std::memcpy(&some, scores + i, sizeof some);
            const Doubles weight = wide_exponential(__builtin_convertvector(some, Doubles) - most);
            std::memcpy(&weights[i], &weight, sizeof weight);
            total += weight;
        }
        double sum = 0;
        for (int64_t i = 0; i < STEP; ++i) sum += total[i];
        const double share = 1 / sum;
        for (int64_t i = 0; i < filled; ++i) ranked[i] += weights[i] * share;
    }
    ranked.resize(filled);
    // What is no number ranks last, so that every order below is one.
    for (double& one : ranked) one = one == one ? one : NEVER;
    const double always = std::numeric_limits<double>::infinity();
    std::fill_n(ranked.begin(), std::min(filled, (s.sinks + s.page - 1) / s.page), always);
    if (s.window)
        std::fill(ranked.begin() + std::max<int64_t>(0, s.length - s.window) / s.page, ranked.end(), always);
    return ranked;
}

// The pages that rank first, of equal ones the earliest, in the order in which they lie in memory.
std::vector<int64_t> choose(const std::vector<double>& ranked, int64_t pages) {
    std::vector<double> order = ranked;
    std::nth_element(order.begin(), order.begin() + pages - 1, order.end(), std::greater<>());
    const double least = order[pages - 1];
    int64_t ties = pages - std::count_if(ranked.begin(), ranked.end(), [&](double one) { return one > least; });
    std::vector<int64_t> chosen;
    chosen.reserve(pages);
    for (size_t page = 0; page < ranked.size(); ++page)
        if (ranked[page] > least || (ranked[page] == least && ties-- > 0)) chosen.push_back(page);
    return chosen;
}

// Some of the chosen pages of one key/value head: where each begins, and how many tokens it holds.
struct Pages {
    const int64_t* chosen;
    int64_t count;
    const Sizes& s;

    // Only the last page of all can be shorter, and then it is the last of the chosen.
    int64_t held(int64_t turn) const { return std::min(s.page, s.length - chosen[turn] * s.page); }
    int64_t tokens() const { return (count - 1) * s.page + held(count - 1); }

    // Rows of a page that is computed with some turns from now, a row for each row of this turn's.
    template <typename T>
    const T* ahead(const T* rows, int64_t row_width, int64_t turn) const {
        const int64_t page_bytes = s.page * row_width * static_cast<int64_t>(sizeof(T));
        const int64_t turns = std::max<int64_t>(1, AHEAD / page_bytes);
        return rows + chosen[std::min(turn + turns, count - 1)] * s.page * row_width;
    }
};

// scores[head][.] = q[head] . keys[t] of the pages' tokens.
template <typename T, int64_t COUNT>
void compare(const float* queries, const T* keys, const Pages& pages, int64_t stride, float* scores) {
    constexpr int64_t P = padded(COUNT), TOKENS = SUMS / P;
    const Sizes& s = pages.s;
    for (int64_t turn = 0; turn < pages.count; ++turn) {
        const T* page = keys + pages.chosen[turn] * s.page * s.head_width;
        const T* next = pages.ahead(keys, s.head_width, turn);
        const int64_t held = pages.held(turn);
        for (int64_t t = 0; t < held; t += TOKENS) {
            const int64_t some = std::min(TOKENS, held - t);
            fetch(next + t * s.head_width, some * s.head_width * sizeof(T));
            const T* key[TOKENS];
#pragma GCC unroll 16
            for (int64_t i = 0; i < TOKENS; ++i) key[i] = page + std::min(t + i, held - 1) * s.head_width;
            Lanes total[P * TOKENS] = {};
            for (int64_t c = 0; c < s.head_width; c += LANES) {
                Lanes query[COUNT];
#pragma GCC unroll 4
                for (int64_t head = 0; head < COUNT; ++head) query[head] = load(queries + head * s.head_width + c);
#pragma GCC unroll 16
                for (int64_t i = 0; i < TOKENS; ++i) {
                    const Lanes part = load(key[i] + c);
#pragma GCC unroll 4
                    for (int64_t head = 0; head < COUNT; ++head) total[head * TOKENS + i] += part * query[head];
                }
            }
            alignas(LINE) float found[P * TOKENS];
#pragma GCC unroll 16
            for (int64_t i = 0; i < P * TOKENS; i += LANES) store(found + i, folded(total + i));
            float* to = scores + turn * s.page + t;
            for (int64_t head = 0; head < COUNT; ++head)
                if (some == TOKENS)
                    std::memcpy(to + head * stride, found + head * TOKENS, TOKENS * sizeof(float));
                else
                    std::copy_n(found + head * TOKENS, some, to + head * stride);
        }
    }
}

// output[head] += sum over a page's tokens of weights[head][.] values[t], PARTS * LANES columns from `column`.
template <typename T, int64_t COUNT, int64_t PARTS>
void weigh_columns(const float* weights, int64_t stride, const T* values, const Sizes& s, int64_t held,
                   int64_t column, float* output) {
    Lanes total[COUNT][PARTS];
#pragma GCC unroll 4
    for (int64_t head = 0; head < COUNT; ++head)
#pragma GCC unroll 16
        for (int64_t part = 0; part < PARTS; ++part)
            total[head][part] = load(output + head * s.value_width + column + part * LANES);
    for (int64_t t = 0; t < held; ++t) {
        Lanes value[PARTS];
#pragma GCC unroll 16
        for (int64_t part = 0; part < PARTS; ++part)
            value[part] = load(values + t * s.value_width + column + part * LANES);
#pragma GCC unroll 4
        for (int64_t head = 0; head < COUNT; ++head) {
            const float weight = weights[head * stride + t];
#pragma GCC unroll 16
            for (int64_t part = 0; part < PARTS; ++part) total[head][part] += weight * value[part];
        }
    }
#pragma GCC unroll 4
    for (int64_t head = 0; head < COUNT; ++head)
#pragma GCC unroll 16
        for (int64_t part = 0; part < PARTS; ++part)
            store(output + head * s.value_width + column + part * LANES, total[head][part]);
}

template <typename T, int64_t COUNT>
void weigh(const float* weights, const T* values, const Pages& pages, int64_t stride, float* output) {
    constexpr int64_t PARTS = std::min<int64_t>(SUMS / padded(COUNT), 4);
    const Sizes& s = pages.s;
    for (int64_t turn = 0; turn < pages.count; ++turn) {
        const T* page = values + pages.chosen[turn] * s.page * s.value_width;
        const T* next = pages.ahead(values, s.value_width, turn);
        const int64_t held = pages.held(turn);
        fetch(next, held * s.value_width * sizeof(T));
        int64_t column = 0;
        for (; column + PARTS * LANES <= s.value_width; column += PARTS * LANES)
            weigh_columns<T, COUNT, PARTS>(weights, stride, page, s, held, column, output);
        for (; column < s.value_width; column += LANES)
            weigh_columns<T, COUNT, 1>(weights, stride, page, s, held, column, output);
        weights += held;
    }
}

// In place, over `count` scores, of which as many as fill the last vector are NEVER; gives the log of their sum.
float softmax(float* scores, int64_t count) {
    Lanes tops = load(scores);
    for (int64_t i = LANES; i < count; i += LANES) tops = larger(load(scores + i), tops);
    const float most = across<larger>(tops)[0];
    Lanes totals = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Lanes weights = exponential(load(scores + i) - most);
        store(scores + i, weights);
        totals += weights;
    }
    const float sum = across<added>(totals)[0], share = 1 / sum;
    for (int64_t i = 0; i < count; i += LANES) store(scores + i, load(scores + i) * share);
    return most + std::log(sum);
}

// Attention of a group over some of its pages, and the log of the sum of each head's exponentials.
template <typename T>
void attend(const float* queries, const T* keys, const T* values, const Pages& pages, float* output,
            float* logs) {
    const Sizes& s = pages.s;
    const int64_t read = pages.tokens(), stride = whole(read);
    const Floats scores = floats(std::min(s.group, HEADS) * stride);
    by_heads(s.group, [&]<int64_t COUNT>(int64_t first) {
        float* own = output + first * s.value_width;
        for (int64_t head = 0; head < COUNT; ++head)
            std::fill(scores.get() + head * stride + read, scores.get() + (head + 1) * stride, NEVER);
        compare<T, COUNT>(queries + first * s.head_width, keys, pages, stride, scores.get());
        for (int64_t head = 0; head < COUNT; ++head)
            logs[first + head] = softmax(scores.get() + head * stride, read);
        std::fill(own, own + COUNT * s.value_width, 0.0f);
        weigh<T, COUNT>(scores.get(), values, pages, stride, own);
    });
}

// The units from .. until - 1: parts of the chosen pages of each key/value head, one behind the other.
template <typename T>
void decode(const Call& call, int64_t from, int64_t until) {
    const Sizes& s = call.sizes;
    const int64_t stride = whole(s.filled());
    const Floats best = floats(s.group * stride);
    std::vector<int64_t> chosen;
    for (int64_t unit = from, ranked = -1; unit < until; ++unit) {
        const int64_t stack = unit / s.parts, part = unit % s.parts;
        const float* asked = call.queries + stack * s.group * s.head_width;
        if (stack != ranked) {
            const T* leading = static_cast<const T*>(call.leading) + stack * s.width * s.room;
            rank_heads(asked, leading, s, stride, best.get());
            chosen = choose(rank(best.get(), s, stride), s.pages);
            ranked = stack;
        }
        const int64_t first = s.pages * part / s.parts, last = s.pages * (part + 1) / s.parts;
        attend(asked, static_cast<const T*>(call.keys) + stack * s.room * s.head_width,
               static_cast<const T*>(call.values) + stack * s.room * s.value_width,
               Pages{chosen.data() + first, last - first, s}, call.output + unit * s.group * s.value_width,
               call.logs + unit * s.group);
    }
}

}  // namespace

extern "C" void fourfold_loki_decode(const void* call, int64_t from, int64_t until) {
    const Call& given = *static_cast<const Call*>(call);
    (given.is_bfloat16 ? decode<BFloat16> : decode<float>)(given, from, until);
}

// output[stack][head]: its parts, each weighted by its share of the softmax.
extern "C" void fourfold_loki_merge(const Call* call, float* output, int64_t stacks) {
    const Sizes& s = call->sizes;
    const float *parted = call->output, *logs = call->logs;
    for (int64_t stack = 0; stack < stacks; ++stack)
        for (int64_t head = 0; head < s.group; ++head, output += s.value_width) {
            const auto unit = [&](int64_t part) { return (stack * s.parts + part) * s.group + head; };
            float most = NEVER, sum = 0;
            for (int64_t part = 0; part < s.parts; ++part) most = std::max(most, logs[unit(part)]);
            for (int64_t part = 0; part < s.parts; ++part) sum += std::exp(logs[unit(part)] - most);
            std::fill(output, output + s.value_width, 0.0f);
            for (int64_t part = 0; part < s.parts; ++part) {
                const float share = std::exp(logs[unit(part)] - most) / sum;
                const float* own = parted + unit(part) * s.value_width;
                for (int64_t i = 0; i < s.value_width; ++i) output[i] += share * own[i];
            }
        }
}
