// One decoded token on a CPU: rank pages by the leading coordinates, then read only the best.
//
// Every number of the cache is read at most once, as float32 whatever it is stored in, sixteen at a time in
// the compiler's portable vectors. The heads of a group share each read. `native.py` compiles this file for the
// processor that it runs on; the arithmetic is that of `cpu.py`, which is also what runs without a compiler.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 64;  // tokens scored together; the cache's room is a multiple of it
constexpr int64_t HEADS = 4;   // query heads whose sums are held in registers together
constexpr int64_t LINE = 64;   // bytes that a processor fetches at once
constexpr float NEVER = -std::numeric_limits<float>::infinity();

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));

struct BFloat16 {
    uint16_t bits;
};

inline Lanes load(const float* from) {
    Lanes value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// A bfloat16 is the upper half of a float32.
inline Lanes load(const BFloat16* from) {
    Halves half;
    std::memcpy(&half, from, sizeof half);
    const Words word = __builtin_convertvector(half, Words) << 16;
    Lanes value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline void store(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }

inline float sum(Lanes value) {
    float lane[LANES];
    store(lane, value);
    for (int64_t width = LANES / 2; width > 0; width /= 2)
        for (int64_t i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
}

inline void fetch(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(static_cast<const char*>(from) + at);
}

struct Sizes {
    int64_t group, head_width, value_width, width, room, length, pages, page, sinks, window;
};

// scores[head][t] = q[head][:width] . leading[:width][t], for the tokens first .. first + BLOCK - 1.
template <typename T, int64_t COUNT>
void score_block(const float* queries, const T* leading, const Sizes& s, int64_t first, float* scores) {
    constexpr int64_t PARTS = BLOCK / LANES;
    Lanes total[COUNT][PARTS] = {};
    for (int64_t c = 0; c < s.width; ++c) {
        const T* row = leading + c * s.room + first;
        fetch(row + 2 * BLOCK, BLOCK * sizeof(T));
        for (int64_t part = 0; part < PARTS; ++part) {
            const Lanes keys = load(row + part * LANES);
            for (int64_t head = 0; head < COUNT; ++head)
                total[head][part] += queries[head * s.head_width + c] * keys;
        }
    }
    for (int64_t head = 0; head < COUNT; ++head)
        for (int64_t part = 0; part < PARTS; ++part)
            store(scores + head * BLOCK + part * LANES, total[head][part]);
}

// best[head][page]: the largest score of each page.
template <typename T, int64_t COUNT>
void pool(const float* queries, const T* leading, const Sizes& s, int64_t whole, float* best) {
    std::fill(best, best + COUNT * whole, NEVER);
    alignas(LINE) float scores[COUNT * BLOCK];
    for (int64_t first = 0; first < s.length; first += BLOCK) {
        score_block<T, COUNT>(queries, leading, s, first, scores);
        const int64_t held = std::min(BLOCK, s.length - first);
        for (int64_t head = 0; head < COUNT; ++head) {
            float* pages = best + head * whole;
            for (int64_t from = 0; from < held;) {
                const int64_t page = (first + from) / s.page;
                const int64_t until = std::min(held, (page + 1) * s.page - first);
                float most = pages[page];
                for (; from < until; ++from) most = std::max(most, scores[head * BLOCK + from]);
                pages[page] = most;
            }
        }
    }
}

// Sum over the group of each head's weights, in double, where no weight that could matter vanishes.
std::vector<double> rank(const std::vector<float>& best, const Sizes& s, int64_t whole) {
    std::vector<double> ranked(best.begin(), best.begin() + whole);
    if (s.group > 1) {
        std::fill(ranked.begin(), ranked.end(), 0.0);
        std::vector<double> weights(whole);
        for (int64_t head = 0; head < s.group; ++head) {
            const float* scores = best.data() + head * whole;
            const double most = *std::max_element(scores, scores + whole);
            double total = 0;
            for (int64_t page = 0; page < whole; ++page)
                total += weights[page] = std::exp(scores[page] - most);
            for (int64_t page = 0; page < whole; ++page) ranked[page] += weights[page] / total;
        }
    }
    const double always = std::numeric_limits<double>::infinity();
    std::fill_n(ranked.begin(), std::min(whole, (s.sinks + s.page - 1) / s.page), always);
    if (s.window)
        std::fill(ranked.begin() + std::max<int64_t>(0, s.length - s.window) / s.page, ranked.end(), always);
    return ranked;
}

// The pages that rank first, of equal ones the earliest, in the order in which they lie in memory.
std::vector<int64_t> choose(const std::vector<double>& ranked, int64_t pages) {
    std::vector<int64_t> order(ranked.size());
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + pages - 1, order.end(), [&](int64_t a, int64_t b) {
        return ranked[a] != ranked[b] ? ranked[a] > ranked[b] : a < b;
    });
    order.resize(pages);
    std::sort(order.begin(), order.end());
    return order;
}

// scores[head][.] = q[head] . keys[t] of the chosen pages' tokens.
template <typename T, int64_t COUNT>
void compare(const float* queries, const T* keys, const Sizes& s, const std::vector<int64_t>& chosen,
             int64_t stride, float* scores) {
    int64_t at = 0;
    for (size_t turn = 0; turn < chosen.size(); ++turn) {
        const T* page = keys + chosen[turn] * s.page * s.head_width;
        const T* next = keys + chosen[std::min(turn + 1, chosen.size() - 1)] * s.page * s.head_width;
        const int64_t held = std::min(s.page, s.length - chosen[turn] * s.page);
        for (int64_t t = 0; t < held; ++t, ++at) {
            const T* key = page + t * s.head_width;
            fetch(next + t * s.head_width, s.head_width * sizeof(T));
            Lanes total[COUNT] = {};
            for (int64_t c = 0; c < s.head_width; c += LANES) {
                const Lanes part = load(key + c);
                for (int64_t head = 0; head < COUNT; ++head)
                    total[head] += part * load(queries + head * s.head_width + c);
            }
            for (int64_t head = 0; head < COUNT; ++head) scores[head * stride + at] = sum(total[head]);
        }
    }
}

// output[head] += sum over the chosen tokens of weights[head][.] values[t], PARTS * LANES columns from `column`.
template <typename T, int64_t COUNT, int64_t PARTS>
void gather_columns(const float* weights, int64_t stride, const T* values, const Sizes& s, int64_t held,
                    int64_t column, float* output) {
    Lanes total[COUNT][PARTS];
    for (int64_t head = 0; head < COUNT; ++head)
        for (int64_t part = 0; part < PARTS; ++part)
            total[head][part] = load(output + head * s.value_width + column + part * LANES);
    for (int64_t t = 0; t < held; ++t)
        for (int64_t part = 0; part < PARTS; ++part) {
            const Lanes value = load(values + t * s.value_width + column + part * LANES);
            for (int64_t head = 0; head < COUNT; ++head)
                total[head][part] += weights[head * stride + t] * value;
        }
    for (int64_t head = 0; head < COUNT; ++head)
        for (int64_t part = 0; part < PARTS; ++part)
            store(output + head * s.value_width + column + part * LANES, total[head][part]);
}

template <typename T, int64_t COUNT>
void gather(const float* weights, const T* values, const Sizes& s, const std::vector<int64_t>& chosen,
            int64_t stride, float* output) {
    constexpr int64_t PARTS = 4;
    int64_t at = 0;
    for (size_t turn = 0; turn < chosen.size(); ++turn) {
        const T* page = values + chosen[turn] * s.page * s.value_width;
        const T* next = values + chosen[std::min(turn + 1, chosen.size() - 1)] * s.page * s.value_width;
        const int64_t held = std::min(s.page, s.length - chosen[turn] * s.page);
        fetch(next, held * s.value_width * sizeof(T));
        int64_t column = 0;
        for (; column + PARTS * LANES <= s.value_width; column += PARTS * LANES)
            gather_columns<T, COUNT, PARTS>(weights + at, stride, page, s, held, column, output);
        for (; column < s.value_width; column += LANES)
            gather_columns<T, COUNT, 1>(weights + at, stride, page, s, held, column, output);
        at += held;
    }
}

// e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= ln(2)/2. Below -87 it stays at e^-87.
inline Lanes exponential(Lanes x) {
    const Lanes least = Lanes{} - 87.0f;
    x = x > least ? x : least;
    const float round = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    const Lanes shifted = x * 1.44269504f + round;
    const Lanes n = shifted - round;
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes power = r * 1.98756915e-4f + 1.39819995e-3f;
    power = power * r + 8.33345190e-3f;
    power = power * r + 4.16657960e-2f;
    power = power * r + 1.66666650e-1f;
    power = power * r + 5.00000000e-1f;
    power = power * r * r + r + 1.0f;
    Words bits, exponent;
    std::memcpy(&bits, &power, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&power, &bits, sizeof bits);
    return power;
}

// In place, over `count` scores; up to the next multiple of LANES they must be NEVER.
void softmax(float* scores, int64_t count) {
    const float most = *std::max_element(scores, scores + count);
    Lanes totals = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Lanes weights = exponential(load(scores + i) - most);
        store(scores + i, weights);
        totals += weights;
    }
    const float share = 1 / sum(totals);
    for (int64_t i = 0; i < count; i += LANES) store(scores + i, load(scores + i) * share);
}

// A group of heads, HEADS at a time; `Call::run<COUNT>(first)` is compiled for each number of them.
template <typename Call>
void by_heads(int64_t group, const Call& call) {
    for (int64_t first = 0; first < group; first += HEADS) switch (std::min(HEADS, group - first)) {
            case 1: call.template operator()<1>(first); break;
            case 2: call.template operator()<2>(first); break;
            case 3: call.template operator()<3>(first); break;
            default: call.template operator()<HEADS>(first);
        }
}

template <typename T>
void decode_stack(const float* queries, const T* keys, const T* values, const T* leading, float* output,
                  const Sizes& s) {
    const int64_t whole = (s.length + s.page - 1) / s.page;
    std::vector<float> best(s.group * whole);
    by_heads(s.group, [&]<int64_t COUNT>(int64_t first) {
        pool<T, COUNT>(queries + first * s.head_width, leading, s, whole, best.data() + first * whole);
    });
    const std::vector<int64_t> chosen = choose(rank(best, s, whole), s.pages);
    // Only the last page of all can be shorter, and then it is the last of the chosen.
    const int64_t beyond = std::max<int64_t>(0, (chosen.back() + 1) * s.page - s.length);
    const int64_t read = s.pages * s.page - beyond;
    const int64_t stride = (read + LANES - 1) / LANES * LANES;
    std::vector<float> scores(s.group * stride, NEVER);
    by_heads(s.group, [&]<int64_t COUNT>(int64_t first) {
        float* some = scores.data() + first * stride;
        float* own = output + first * s.value_width;
        compare<T, COUNT>(queries + first * s.head_width, keys, s, chosen, stride, some);
        for (int64_t head = 0; head < COUNT; ++head) softmax(some + head * stride, read);
        std::fill(own, own + COUNT * s.value_width, 0.0f);
        gather<T, COUNT>(some, values, s, chosen, stride, own);
    });
}

template <typename T>
void decode(const float* queries, const void* keys, const void* values, const void* leading, float* output,
            const Sizes& s, int64_t from, int64_t until) {
    for (int64_t stack = from; stack < until; ++stack)
        decode_stack(queries + stack * s.group * s.head_width,
                     static_cast<const T*>(keys) + stack * s.room * s.head_width,
                     static_cast<const T*>(values) + stack * s.room * s.value_width,
                     static_cast<const T*>(leading) + stack * s.width * s.room,
                     output + stack * s.group * s.value_width, s);
}

}  // namespace

extern "C" void fourfold_loki_decode(const float* queries, const void* keys, const void* values,
                                     const void* leading, float* output, const int64_t* sizes, int64_t from,
                                     int64_t until, int32_t is_bfloat16) {
    const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                  sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]};
    (is_bfloat16 ? decode<BFloat16> : decode<float>)(queries, keys, values, leading, output, s, from, until);
}
