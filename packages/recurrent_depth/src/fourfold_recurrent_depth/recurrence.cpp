// Sandwich blocks on a CPU, without gradient: one call for all recurrences of a pass.
//
// The arithmetic is that of `lean.py`, in float32. Weights are read as torch holds them, [out, in]; where the rows
// have many tokens they are first packed for this call, so that no copy can be stale. In which order a product sums
// depends on the tokens of a row, never on how many rows are computed together: a row's numbers are its own.
// `native.py` makes the arguments, and says there what this file does not take.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t MANY = 16;    // tokens of a row from which packing the weights pays
constexpr int64_t CHUNK = 128;  // rows that go through the products of a block together, and stay in a cache
constexpr int64_t QUERIES = 8;  // tokens whose scores are held together
constexpr float NEVER = -std::numeric_limits<float>::infinity();

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Words __attribute__((vector_size(LANES * sizeof(int32_t))));

constexpr std::align_val_t LINE{64};  // vectors that lie across lines of the cache are read at half the speed

struct Free {
    void operator()(float* memory) const { operator delete[](memory, LINE); }
};
using Floats = std::unique_ptr<float[], Free>;
Floats floats(int64_t count) { return Floats(new (LINE) float[count]); }

// The structures below are mirrored in native.py.

struct Block {
    const float *gains[4];
    const float *into_heads, *bias, *out_of_heads, *into_hidden, *out_of_hidden;
};

// Keys and values by slot, row, head, token; `rows` says which row of the store each row of the pass is.
struct Store {
    float *keys, *values;
    int64_t first_slot, slot_stride, row_stride, head_stride;
    const int64_t* rows;

    int64_t place(int64_t slot, int64_t row, int64_t head) const {
        return (slot - first_slot) * slot_stride + (rows ? rows[row] : row) * row_stride + head * head_stride;
    }
};

struct Pass {
    int64_t tokens, width, heads, hidden, held, layers, steps, rotary_row, rotary_token, mask_row, mask_query;
    const Block* blocks;
    const int64_t* slots;    // of each step's first layer
    const float* adapter;    // [width, 2 width], or null: the blocks alone
    const float* injected;   // the embedding's share of each recurrence
    const float* rotary;     // (cos, sin) pairs
    const uint8_t* mask;     // null is causal
    const uint8_t* running;  // null, or which tokens still write their keys
    Store cached, own;
    float eps;

    int64_t head_width() const { return width / heads; }
};

inline Lanes load(const float* from) {
    Lanes value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }

// Where lane J of a fold comes from: runs of HALF lanes of a, then of b, and what is added lies HALF further.
template <int64_t HALF>
constexpr int pick(int64_t lane, int64_t further) {
    const int64_t within = lane % (2 * HALF);
    const int64_t from = lane - within + within % HALF + further * HALF;
    return static_cast<int>(within < HALF ? from : from + LANES);
}

template <int64_t HALF, size_t... J>
inline Lanes fold(Lanes a, Lanes b, std::index_sequence<J...>) {
    return __builtin_shufflevector(a, b, pick<HALF>(J, 0)...) + __builtin_shufflevector(a, b, pick<HALF>(J, 1)...);
}

// Lane j of the result is the sum of the lanes of parts[j].
template <int64_t HALF = LANES / 2>
inline Lanes sums(Lanes* parts) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < HALF; ++i)
        parts[i] = fold<HALF>(parts[i], parts[i + HALF], std::make_index_sequence<LANES>());
    if constexpr (HALF > 1) return sums<HALF / 2>(parts);
    return parts[0];
}

template <int64_t HALF, size_t... J>
inline Lanes exchange(Lanes value, std::index_sequence<J...>) {
    return __builtin_shufflevector(value, value, static_cast<int>(J ^ HALF)...);
}

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
inline Lanes added(Lanes a, Lanes b) { return a + b; }

// All lanes of a vector combined, in every lane.
template <Lanes (*COMBINE)(Lanes, Lanes), int64_t HALF = LANES / 2>
inline Lanes across(Lanes value) {
    value = COMBINE(value, exchange<HALF>(value, std::make_index_sequence<LANES>()));
    if constexpr (HALF > 1) return across<COMBINE, HALF / 2>(value);
    return value;
}

// e^x to 2 units in the last place: 2^n e^r with |r| <= ln(2)/2; 0 below -87, and not more than e^88.
inline Lanes exponential(Lanes x) {
    const Lanes least = Lanes{} - 87.0f, most = Lanes{} + 88.0f;
    const Lanes within = x < least ? least : x > most ? most : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    const Lanes shifted = within * 1.44269504f + round;
    const Lanes n = shifted - round;
    const Lanes r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
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
    return x < least ? Lanes{} : power;
}

constexpr int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// A matrix in memory, by rows.
struct Rows {
    const float* at;
    int64_t stride;
    const float* operator[](int64_t row) const { return at + row * stride; }
};

// y[r][o] = x[r] . w[o] for R rows and LANES / R outputs; of the outputs only the first `outputs` exist.
template <int64_t R>
inline void tile(Rows x, Rows w, int64_t inner, int64_t outputs, float* y, int64_t y_stride) {
    constexpr int64_t O = LANES / R;
    const float* weights[O];
#pragma GCC unroll 16
    for (int64_t o = 0; o < O; ++o) weights[o] = w[std::min(o, outputs - 1)];
    Lanes total[LANES] = {};
    for (int64_t k = 0; k < inner; k += LANES) {
        Lanes row[R];
#pragma GCC unroll 16
        for (int64_t r = 0; r < R; ++r) row[r] = load(x[r] + k);
#pragma GCC unroll 16
        for (int64_t o = 0; o < O; ++o) {
            const Lanes weight = load(weights[o] + k);
#pragma GCC unroll 16
            for (int64_t r = 0; r < R; ++r) total[r * O + o] += row[r] * weight;
        }
    }
    float found[LANES];
    store(found, sums(total));
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) std::memcpy(y + r * y_stride, found + r * O, O * sizeof(float));
}

// y = x w^T, straight from where w lies. Writes a multiple of LANES outputs a row.
void product(Rows x, int64_t rows, Rows w, int64_t outputs, int64_t inner, float* y, int64_t y_stride) {
    for (int64_t o = 0; o < outputs; o += LANES) {
        const auto tiles = [&]<int64_t R>(int64_t r) {
            for (int64_t part = o; part < std::min(o + LANES, outputs); part += LANES / R)
                tile<R>({x[r], x.stride}, {w[part], w.stride}, inner, outputs - part, y + r * y_stride + part,
                        y_stride);
        };
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) tiles.template operator()<4>(r);
        for (; r + 2 <= rows; r += 2) tiles.template operator()<2>(r);
        for (; r < rows; ++r) tiles.template operator()<1>(r);
    }
}

// y[r] = sum over k of x[r][k] * panel[k] for R rows and P vectors of outputs.
template <int64_t R, int64_t P>
inline void panel_tile(Rows x, const float* panel, int64_t inner, float* y, int64_t y_stride) {
    Lanes total[R][P] = {};
    for (int64_t k = 0; k < inner; ++k, panel += P * LANES) {
        Lanes weight[P];
#pragma GCC unroll 4
        for (int64_t p = 0; p < P; ++p) weight[p] = load(panel + p * LANES);
#pragma GCC unroll 8
        for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int64_t p = 0; p < P; ++p) total[r][p] += x[r][k] * weight[p];
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int64_t p = 0; p < P; ++p) store(y + r * y_stride + p * LANES, total[r][p]);
}

template <int64_t P>
void panel_product(Rows x, int64_t rows, const float* panel, int64_t inner, float* y, int64_t y_stride) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) panel_tile<8, P>({x[r], x.stride}, panel, inner, y + r * y_stride, y_stride);
    for (; r + 4 <= rows; r += 4) panel_tile<4, P>({x[r], x.stride}, panel, inner, y + r * y_stride, y_stride);
    for (; r < rows; ++r) panel_tile<1, P>({x[r], x.stride}, panel, inner, y + r * y_stride, y_stride);
}

// A matrix [outputs, inner] to multiply with: as torch holds it, or in panels of WIDE outputs, [panel, inner, output],
// of which the last is filled up to LANES with repetitions.
class Weight {
   public:
    Weight(Rows rows, int64_t outputs, int64_t inner, bool packs)
        : rows(rows), inner(inner), held(whole(outputs)) {
        if (!packs) return;
        panels = floats(held * inner);
        for (int64_t o = 0; o < held; o += WIDE) {
            const int64_t across = std::min(WIDE, held - o);
            float* panel = panels.get() + o * inner;
            for (int64_t first = 0; first < inner; first += LANES)  // a line of each row at a time
                for (int64_t i = 0; i < across; ++i) {
                    const float* row = rows[std::min(o + i, outputs - 1)];
                    for (int64_t k = first; k < first + LANES; ++k) panel[k * across + i] = row[k];
                }
        }
    }

    // y = x w^T for the first `outputs` of w; of y up to WIDE are written at once.
    void multiply(Rows x, int64_t count, int64_t outputs, float* y, int64_t y_stride) const {
        if (!panels) return product(x, count, rows, outputs, inner, y, y_stride);
        for (int64_t o = 0; o < outputs;) {
            const bool is_wide = held - o / WIDE * WIDE >= WIDE;
            const auto by = is_wide ? panel_product<VECTORS> : panel_product<1>;
            by(x, count, panels.get() + o * inner, inner, y + o, y_stride);
            o += is_wide ? WIDE : LANES;
        }
    }

   private:
    static constexpr int64_t VECTORS = 2, WIDE = VECTORS * LANES;
    Rows rows;
    int64_t inner, held;
    Floats panels;
};

// y = (x + plus) / rms(x + plus) * gain; y may be either of them, `plus` may be null.
void norm(const float* x, const float* plus, const float* gain, int64_t width, float eps, float* y) {
    Lanes squares = {};
    for (int64_t i = 0; i < width; i += LANES) {
        const Lanes value = plus ? load(x + i) + load(plus + i) : load(x + i);
        store(y + i, value);
        squares += value * value;
    }
    const float scale = 1 / std::sqrt(across<added>(squares)[0] / width + eps);
    for (int64_t i = 0; i < width; i += LANES) store(y + i, load(y + i) * scale * load(gain + i));
}

// hidden = silu(first half) * second half
void gate(const float* halves, int64_t hidden, float* output) {
    for (int64_t i = 0; i < hidden; i += LANES) {
        const Lanes x = load(halves + i);
        store(output + i, x / (1.0f + exponential(-x)) * load(halves + hidden + i));
    }
}

// Of one head: pairs of (x + bias) turned by their position's angle.
void turn(const float* x, const float* bias, const float* rotary, int64_t head_width, float* y) {
    for (int64_t i = 0; i < head_width; i += 2) {
        const float a = x[i] + bias[i], b = x[i + 1] + bias[i + 1];
        const float cosine = rotary[i], sine = rotary[i + 1];
        y[i] = a * cosine - b * sine;
        y[i + 1] = a * sine + b * cosine;
    }
}

// In place, over a multiple of LANES scores; what is NEVER weighs nothing, and a row of nothing else is zeros.
void softmax(float* scores, int64_t count, float scaling) {
    Lanes tops = Lanes{} + NEVER;
    for (int64_t i = 0; i < count; i += LANES) {
        const Lanes value = load(scores + i) * scaling;
        store(scores + i, value);
        tops = larger(value, tops);
    }
    const float top = across<larger>(tops)[0];
    if (top == NEVER) return std::fill(scores, scores + count, 0.0f);
    Lanes totals = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Lanes weight = exponential(load(scores + i) - top);
        store(scores + i, weight);
        totals += weight;
    }
    const float share = 1 / across<added>(totals)[0];
    for (int64_t i = 0; i < count; i += LANES) store(scores + i, load(scores + i) * share);
}

// y[r] += sum over t of weights[r][t] * values[t], LANES columns of R rows.
template <int64_t R>
inline void mix_columns(Rows weights, Rows values, int64_t count, float* y, int64_t y_stride) {
    constexpr int64_t TURNS = R >= 4 ? 1 : 4;  // sums that wait for one another are kept apart
    Lanes total[R][TURNS] = {};
    int64_t t = 0;
    for (; t + TURNS <= count; t += TURNS)
#pragma GCC unroll 4
        for (int64_t turn = 0; turn < TURNS; ++turn) {
            const Lanes value = load(values[t + turn]);
#pragma GCC unroll 8
            for (int64_t r = 0; r < R; ++r) total[r][turn] += weights[r][t + turn] * value;
        }
    for (; t < count; ++t)
#pragma GCC unroll 8
        for (int64_t r = 0; r < R; ++r) total[r][0] += weights[r][t] * load(values[t]);
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
        Lanes whole = total[r][0];
#pragma GCC unroll 4
        for (int64_t turn = 1; turn < TURNS; ++turn) whole += total[r][turn];
        store(y + r * y_stride, load(y + r * y_stride) + whole);
    }
}

void mix(Rows weights, int64_t rows, Rows values, int64_t count, int64_t head_width, float* y, int64_t y_stride) {
    for (int64_t column = 0; column < head_width; column += LANES) {
        const Rows part{values.at + column, values.stride};
        int64_t r = 0;
        for (; r + 8 <= rows; r += 8)
            mix_columns<8>({weights[r], weights.stride}, part, count, y + r * y_stride + column, y_stride);
        for (; r < rows; ++r)
            mix_columns<1>({weights[r], weights.stride}, part, count, y + r * y_stride + column, y_stride);
    }
}

// The weights of a block.
struct Layer {
    Weight into_heads, out_of_heads, into_hidden, out_of_hidden;

    Layer(const Pass& p, const Block& b, bool packs)
        : into_heads({b.into_heads, p.width}, 3 * p.width, p.width, packs),
          out_of_heads({b.out_of_heads, p.width}, p.width, p.width, packs),
          into_hidden({b.into_hidden, p.width}, 2 * p.hidden, p.width, packs),
          out_of_hidden({b.out_of_hidden, p.hidden}, p.width, p.hidden, packs) {}
};

struct Scratch {
    Floats queries, wide, narrow, scores;

    Scratch(const Pass& pass, int64_t rows)
        : queries(floats(rows * pass.tokens * pass.width)),
          wide(floats(CHUNK * std::max(3 * pass.width, 2 * pass.hidden))),
          narrow(floats(CHUNK * std::max(pass.width, pass.hidden))),
          scores(floats(QUERIES * stride(pass))) {}

    static int64_t stride(const Pass& pass) { return whole(pass.held + pass.tokens) + LANES; }
};

// One head of one row: queries become what they read.
void attend(const Pass& pass, const Scratch& scratch, int64_t slot, int64_t row, int64_t head, float* queries) {
    const int64_t head_width = pass.head_width(), stride = Scratch::stride(pass);
    const float scaling = 1 / std::sqrt(static_cast<float>(head_width));
    const int64_t own = pass.own.place(slot, row, head);
    const float *keys = pass.own.keys + own, *values = pass.own.values + own;
    const float *held_keys = keys, *held_values = values;
    int64_t apart = pass.held;  // keys that do not lie in one stretch with the pass's own
    if (apart) {
        const int64_t place = pass.cached.place(slot, row, head);
        held_keys = pass.cached.keys + place;
        held_values = pass.cached.values + place;
        if (keys == held_keys + apart * head_width) {
            keys = held_keys;
            values = held_values;
            apart = 0;
        }
    }
    const Weight held_weight({held_keys, head_width}, apart, head_width, false);
    const Weight weight({keys, head_width}, pass.held + pass.tokens - apart, head_width, pass.tokens >= MANY);
    for (int64_t first = 0; first < pass.tokens; first += QUERIES) {
        const int64_t count = std::min(QUERIES, pass.tokens - first);
        const int64_t all = pass.held + (pass.mask ? pass.tokens : first + count);
        float *query = queries + first * pass.width, *scores = scratch.scores.get();
        const Rows asked{query, pass.width};
        held_weight.multiply(asked, count, apart, scores, stride);
        weight.multiply(asked, count, all - apart, scores + apart, stride);
        for (int64_t r = 0; r < count; ++r) {
            float* score = scores + r * stride;
            if (pass.mask) {
                const uint8_t* sees = pass.mask + row * pass.mask_row + (first + r) * pass.mask_query;
                for (int64_t t = 0; t < all; ++t) score[t] = sees[t] ? score[t] : NEVER;
            }
            const int64_t until = pass.mask ? all : pass.held + first + r + 1;
            std::fill(score + until, score + whole(all), NEVER);
            softmax(score, whole(all), scaling);
            std::fill(query + r * pass.width, query + r * pass.width + head_width, 0.0f);
        }
        mix({scores, stride}, count, {held_values, head_width}, apart, head_width, query, pass.width);
        mix({scores + apart, stride}, count, {values, head_width}, all - apart, head_width, query, pass.width);
    }
}

// Queries into `output`, keys and values to where they are kept, for one token.
void into_heads(const Pass& pass, const Block& block, int64_t slot, int64_t place, const float* projected,
                float* output) {
    const int64_t width = pass.width, head_width = pass.head_width();
    const int64_t row = place / pass.tokens, token = place % pass.tokens;
    const float* rotary = pass.rotary + row * pass.rotary_row + token * pass.rotary_token;
    const bool writes = !pass.running || pass.running[place];
    for (int64_t head = 0, at = 0; head < pass.heads; ++head, at += head_width) {
        turn(projected + at, block.bias + at, rotary, head_width, output + at);
        if (!writes) continue;
        const int64_t kept = pass.own.place(slot, row, head) + token * head_width;
        turn(projected + width + at, block.bias + width + at, rotary, head_width, pass.own.keys + kept);
        std::memcpy(pass.own.values + kept, projected + 2 * width + at, head_width * sizeof(float));
    }
}

// One block on the rows first .. last - 1 of the pass, in place; x is that of row 0.
void through(const Pass& pass, const Block& block, const Layer& layer, const Scratch& scratch, int64_t slot,
             int64_t first, int64_t last, float* x) {
    const int64_t width = pass.width, hidden = pass.hidden, begin = first * pass.tokens, end = last * pass.tokens;
    float *queries = scratch.queries.get(), *wide = scratch.wide.get(), *narrow = scratch.narrow.get();
    for (int64_t from = begin; from < end; from += CHUNK) {
        const int64_t rows = std::min(CHUNK, end - from);
        for (int64_t r = 0; r < rows; ++r)
            norm(x + (from + r) * width, nullptr, block.gains[0], width, pass.eps, narrow + r * width);
        layer.into_heads.multiply({narrow, width}, rows, 3 * width, wide, 3 * width);
        for (int64_t r = 0; r < rows; ++r)
            into_heads(pass, block, slot, from + r, wide + r * 3 * width, queries + (from + r - begin) * width);
    }
    for (int64_t row = first; row < last; ++row)
        for (int64_t head = 0; head < pass.heads; ++head)
            attend(pass, scratch, slot, row, head,
                   queries + (row - first) * pass.tokens * width + head * pass.head_width());
    for (int64_t from = begin; from < end; from += CHUNK) {
        const int64_t rows = std::min(CHUNK, end - from);
        float* state = x + from * width;
        layer.out_of_heads.multiply({queries + (from - begin) * width, width}, rows, width, wide, width);
        for (int64_t r = 0; r < rows; ++r) {
            float* own = state + r * width;
            norm(wide + r * width, own, block.gains[1], width, pass.eps, own);
            norm(own, nullptr, block.gains[2], width, pass.eps, narrow + r * width);
        }
        layer.into_hidden.multiply({narrow, width}, rows, 2 * hidden, wide, 2 * hidden);
        for (int64_t r = 0; r < rows; ++r) gate(wide + r * 2 * hidden, hidden, narrow + r * hidden);
        layer.out_of_hidden.multiply({narrow, hidden}, rows, width, wide, width);
        for (int64_t r = 0; r < rows; ++r)
            norm(wide + r * width, state + r * width, block.gains[3], width, pass.eps, state + r * width);
    }
}

// x = x A^T + injected, where A is the state's half of the adapter.
void adapt(const Pass& pass, const Weight& adapter, const Scratch& scratch, int64_t begin, int64_t end, float* x) {
    const int64_t width = pass.width;
    float* wide = scratch.wide.get();
    for (int64_t from = begin; from < end; from += CHUNK) {
        const int64_t rows = std::min(CHUNK, end - from);
        adapter.multiply({x + from * width, width}, rows, width, wide, width);
        for (int64_t i = 0; i < rows * width; i += LANES)
            store(x + from * width + i, load(wide + i) + load(pass.injected + from * width + i));
    }
}

}  // namespace

// The rows first .. last - 1 of x [row, token, width], in place: `steps` times the adapter, where there is one, and
// the blocks.
extern "C" void fourfold_recur(const Pass* pass, float* x, int64_t first, int64_t last) {
    const Scratch scratch(*pass, last - first);
    const bool packs = pass->tokens >= MANY;
    const Weight adapter({pass->adapter, 2 * pass->width}, pass->width, pass->width, packs && pass->adapter);
    std::vector<Layer> layers;
    for (int64_t i = 0; i < pass->layers; ++i) layers.emplace_back(*pass, pass->blocks[i], packs);
    for (int64_t step = 0; step < pass->steps; ++step) {
        if (pass->adapter) adapt(*pass, adapter, scratch, first * pass->tokens, last * pass->tokens, x);
        for (int64_t i = 0; i < pass->layers; ++i)
            through(*pass, pass->blocks[i], layers[i], scratch, pass->slots[step] + i, first, last, x);
    }
}
