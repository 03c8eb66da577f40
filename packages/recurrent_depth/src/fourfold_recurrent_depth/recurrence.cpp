// Sandwich blocks on a CPU, without gradient: one call for all recurrences of a pass.
//
// The arithmetic is that of `lean.py`, in float32. Weights are read as torch holds them, [out, in]; where the rows
// have many tokens they are packed once for a forward pass, so that no copy can be stale. In which order a product
// sums depends on the tokens of a row, never on how many rows are computed together: a row's numbers are its own.
// `native.py` makes the arguments, and says there what this file does not take.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
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
constexpr int64_t CHUNK = 144;   // rows that go through the products of a block together, and stay in a cache
constexpr int64_t QUERIES = 12;  // tokens whose scores are held together
constexpr int64_t AHEAD = 1024;  // weights that are fetched before they are needed, at least
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
    const float* panels;  // the four products packed, one behind the other, or null
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
    int64_t tokens, width, heads, hidden, held, layers, steps, rotary_row, rotary_token, mask_row, mask_query, packs;
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
inline void swap_runs(Lanes& a, Lanes& b, std::index_sequence<J...>) {
    const Lanes first = __builtin_shufflevector(a, b, pick<HALF>(J, 0)...);
    b = __builtin_shufflevector(a, b, pick<HALF>(J, 1)...);
    a = first;
}

// Lane j of row i becomes lane i of row j.
template <int64_t HALF = LANES / 2>
inline void transpose(Lanes* square) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i)
        if (!(i & HALF)) swap_runs<HALF>(square[i], square[i + HALF], std::make_index_sequence<LANES>());
    if constexpr (HALF > 1) transpose<HALF / 2>(square);
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

inline Lanes silu(Lanes x) { return x / (1.0f + exponential(-x)); }

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
    const int64_t ahead = std::max(O * inner, AHEAD);  // few rows wait for the weights alone
    Lanes total[LANES] = {};
    for (int64_t k = 0; k < inner; k += LANES) {
        Lanes row[R];
#pragma GCC unroll 16
        for (int64_t r = 0; r < R; ++r) row[r] = load(x[r] + k);
#pragma GCC unroll 16
        for (int64_t o = 0; o < O; ++o) {
            const Lanes weight = load(weights[o] + k);
            __builtin_prefetch(weights[o] + k + ahead);
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
template <int64_t R>
void tiles(Rows x, Rows w, int64_t outputs, int64_t inner, float* y, int64_t y_stride) {
    for (int64_t o = 0; o < std::min(LANES, outputs); o += LANES / R)
        tile<R>(x, {w[o], w.stride}, inner, outputs - o, y + o, y_stride);
}

void product(Rows x, int64_t rows, Rows w, int64_t outputs, int64_t inner, float* y, int64_t y_stride) {
    for (int64_t o = 0; o < outputs; o += LANES) {
        const Rows part{w[o], w.stride};
        int64_t r = 0;
        const auto by = [&](auto tiles, int64_t count) {
            for (; r + count <= rows; r += count)
                tiles({x[r], x.stride}, part, outputs - o, inner, y + r * y_stride + o, y_stride);
        };
        if constexpr (LANES >= 8) by(tiles<8>, 8);
        by(tiles<4>, 4);
        by(tiles<2>, 2);
        by(tiles<1>, 1);
    }
}

// What becomes of the sums of one row's tile: P vectors of outputs.
struct Stored {
    template <int64_t P>
    static void write(const Lanes* total, float* y) {
#pragma GCC unroll 4
        for (int64_t p = 0; p < P; ++p) store(y + p * LANES, total[p]);
    }
};

struct Added {
    template <int64_t P>
    static void write(const Lanes* total, float* y) {
#pragma GCC unroll 4
        for (int64_t p = 0; p < P; ++p) store(y + p * LANES, load(y + p * LANES) + total[p]);
    }
};

struct Gated {  // the second half of the vectors times the silu of the first
    template <int64_t P>
    static void write(const Lanes* total, float* y) {
#pragma GCC unroll 2
        for (int64_t p = 0; p < P / 2; ++p) store(y + p * LANES, silu(total[p]) * total[p + P / 2]);
    }
};

constexpr int64_t ROWS = 6;                        // of a tile: with the vectors below, what registers hold
constexpr int64_t VECTORS = LANES == 16 ? 4 : 2;   // of outputs in a tile, and in a panel
constexpr int64_t WIDE = VECTORS * LANES;

// A panel: the sum over k of x[r][k] * at[k * stride .. ]; meanwhile what is multiplied with next is fetched.
struct Panel {
    const float* at;
    int64_t stride, inner;
    const float* next;
    int64_t share;  // of it, for each k
};

template <class End, int64_t R, int64_t P>
void panel_tile(Rows x, Panel panel, float* y, int64_t y_stride) {
    Lanes total[R][P] = {};
    const float *weights = panel.at, *next = panel.next;
    for (int64_t k = 0; k < panel.inner; ++k, weights += panel.stride, next += panel.share) {
        Lanes weight[P];
#pragma GCC unroll 4
        for (int64_t p = 0; p < P; ++p) weight[p] = load(weights + p * LANES);
        __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 8
        for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int64_t p = 0; p < P; ++p) total[r][p] += x[r][k] * weight[p];
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) End::template write<P>(total[r], y + r * y_stride);
}

template <class End, int64_t P>
void panel_rows(Rows x, int64_t rows, Panel panel, float* y, int64_t y_stride) {
    int64_t r = 0;
    const auto by = [&](auto tile, int64_t count) {
        for (; r + count <= rows; r += count, panel.next += count * panel.inner * panel.share / ROWS)
            tile({x[r], x.stride}, panel, y + r * y_stride, y_stride);
    };
    by(panel_tile<End, ROWS, P>, ROWS);
    by(panel_tile<End, ROWS / 2, P>, ROWS / 2);
    by(panel_tile<End, 1, P>, 1);
}

template <class End>
void panel_product(int64_t vectors, Rows x, int64_t rows, Panel panel, float* y, int64_t y_stride) {
    switch (vectors) {
        case 1:
            if constexpr (!std::is_same_v<End, Gated>) panel_rows<End, 1>(x, rows, panel, y, y_stride);
            break;
        case 2: return panel_rows<End, 2>(x, rows, panel, y, y_stride);
        case 3:
            if constexpr (!std::is_same_v<End, Gated> && VECTORS > 2)
                panel_rows<End, 3>(x, rows, panel, y, y_stride);
            break;
        case 4:
            if constexpr (VECTORS > 2) panel_rows<End, 4>(x, rows, panel, y, y_stride);
    }
}

// A matrix [outputs, inner] to multiply with: as torch holds it, or in panels of WIDE outputs, [panel, inner, output],
// of which the last is as narrow as LANES allow, filled up with repetitions.
class Weight {
   public:
    Weight(Rows rows, int64_t outputs, int64_t inner) : rows(rows), inner(inner), held(whole(outputs)) {}

    // With panels that somebody else has packed and keeps.
    Weight(const float* panels, int64_t outputs, int64_t inner)
        : rows{}, inner(inner), held(whole(outputs)), panels(panels) {}

    static Weight packed(Rows rows, int64_t outputs, int64_t inner) {
        Weight weight(rows, outputs, inner);
        weight.own = floats(weight.held * inner);
        weight.panels = weight.own.get();
        pack(rows, outputs, inner, 0, weight.own.get());
        return weight;
    }

    // Where `half` is not 0, each panel holds as many of the first half of the outputs as of the second.
    static void pack(Rows rows, int64_t outputs, int64_t inner, int64_t half, float* panels) {
        const int64_t held = whole(outputs);
        for (int64_t o = 0; o < held; o += WIDE) {
            const int64_t across = std::min(WIDE, held - o);
            float* panel = panels + o * inner;
            for (int64_t first = 0; first < inner; first += LANES)  // a line of each row at a time
                for (int64_t i = 0; i < across; i += LANES) {
                    Lanes square[LANES];
                    for (int64_t j = 0; j < LANES; ++j) {
                        const int64_t own = i + j, shift = own < across / 2 ? o / 2 : half + o / 2 - across / 2;
                        square[j] = load(rows[half ? shift + own : std::min(o + own, outputs - 1)] + first);
                    }
                    transpose(square);
                    for (int64_t k = 0; k < LANES; ++k) store(panel + (first + k) * across + i, square[k]);
                }
        }
    }

    // y = x w^T for the first `outputs` of w. Writes a multiple of LANES outputs a row.
    void multiply(Rows x, int64_t count, int64_t outputs, float* y, int64_t y_stride) const {
        if (!panels) return product(x, count, rows, outputs, inner, y, y_stride);
        each<Stored>(x, count, outputs, y, y_stride, 1);
    }

    // The same, gated: half as many.
    void multiply_gated(Rows x, int64_t count, float* y, int64_t y_stride) const {
        each<Gated>(x, count, held, y, y_stride, 2);
    }

    const float* behind() const { return panels ? panels + held * inner : nullptr; }

   private:
    Rows rows;
    int64_t inner, held;
    const float* panels = nullptr;
    Floats own;

    template <class End>
    void each(Rows x, int64_t count, int64_t outputs, float* y, int64_t y_stride, int64_t per_output) const {
        for (int64_t o = 0; o < outputs; o += WIDE) {
            const int64_t across = std::min(WIDE, held - o), asked = std::min(across, whole(outputs - o));
            const float *panel = panels + o * inner, *next = o + WIDE < outputs ? panel + across * inner : panel;
            const int64_t share = next == panel ? 0 : across / std::max<int64_t>(count / ROWS, 1);
            panel_product<End>(asked / LANES, x, count, {panel, across, inner, next, share}, y + o / per_output,
                               y_stride);
        }
    }
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
    for (int64_t i = 0; i < hidden; i += LANES)
        store(output + i, silu(load(halves + i)) * load(halves + hidden + i));
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

// y[r] += sum over t of weights[r][t] * values[t]; `many` rows go through the panels' tiles.
void mix(Rows weights, int64_t rows, Rows values, int64_t count, int64_t head_width, bool many, float* y,
         int64_t y_stride) {
    for (int64_t column = 0; many && column < head_width; column += WIDE) {
        const float* panel = values.at + column;
        panel_product<Added>(std::min(WIDE, head_width - column) / LANES, weights, rows,
                             {panel, values.stride, count, panel, 0}, y + column, y_stride);
    }
    for (int64_t r = 0; !many && r < rows; ++r)
        for (int64_t column = 0; column < head_width; column += LANES) {
            constexpr int64_t TURNS = 4;  // sums that wait for one another are kept apart
            const float *weight = weights[r], *value = values.at + column;
            Lanes total[TURNS] = {};
            int64_t t = 0;
            for (; t + TURNS <= count; t += TURNS)
#pragma GCC unroll 4
                for (int64_t turn = 0; turn < TURNS; ++turn)
                    total[turn] += weight[t + turn] * load(value + (t + turn) * values.stride);
            for (; t < count; ++t) total[0] += weight[t] * load(value + t * values.stride);
            float* to = y + r * y_stride + column;
            store(to, load(to) + (((total[0] + total[1]) + total[2]) + total[3]));
        }
}

// The weights of a block.
struct Layer {
    Weight into_heads, out_of_heads, into_hidden, out_of_hidden;

    Layer(const Pass& p, const Block& b)
        : into_heads(made(p, b.into_heads, b.panels, 3 * p.width, p.width)),
          out_of_heads(made(p, b.out_of_heads, into_heads.behind(), p.width, p.width)),
          into_hidden(made(p, b.into_hidden, out_of_heads.behind(), 2 * p.hidden, p.width)),
          out_of_hidden(made(p, b.out_of_hidden, into_hidden.behind(), p.width, p.hidden)) {}

   private:
    static Weight made(const Pass& p, const float* plain, const float* panels, int64_t outputs, int64_t inner) {
        return p.packs ? Weight(panels, outputs, inner) : Weight({plain, inner}, outputs, inner);
    }
};

// Of `rows` rows, how many go through the products together: all parts alike, and of whole tiles.
int64_t part(int64_t rows) {
    const int64_t parts = (rows + CHUNK - 1) / CHUNK;
    return ((rows + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
}

struct Scratch {
    int64_t chunk;
    Floats queries, wide, narrow, scores;

    Scratch(const Pass& pass, int64_t rows)
        : chunk(part(rows * pass.tokens)),
          queries(floats(rows * pass.tokens * pass.width)),
          wide(floats(chunk * std::max(3 * pass.width, (pass.packs ? 1 : 2) * pass.hidden))),
          narrow(floats(chunk * std::max(pass.width, pass.hidden))),
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
    const int64_t together = pass.held + pass.tokens - apart;
    const Rows key_rows{keys, head_width};
    const Weight held_weight({held_keys, head_width}, apart, head_width);
    const Weight weight = pass.packs ? Weight::packed(key_rows, together, head_width)
                                     : Weight(key_rows, together, head_width);
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
        const auto read = [&](const float* shares, const float* from, int64_t number) {
            mix({shares, stride}, count, {from, head_width}, number, head_width, pass.packs, query, pass.width);
        };
        read(scores, held_values, apart);
        read(scores + apart, values, all - apart);
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
    for (int64_t from = begin; from < end; from += scratch.chunk) {
        const int64_t rows = std::min(scratch.chunk, end - from);
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
    for (int64_t from = begin; from < end; from += scratch.chunk) {
        const int64_t rows = std::min(scratch.chunk, end - from);
        float* state = x + from * width;
        layer.out_of_heads.multiply({queries + (from - begin) * width, width}, rows, width, wide, width);
        for (int64_t r = 0; r < rows; ++r) {
            float* own = state + r * width;
            norm(wide + r * width, own, block.gains[1], width, pass.eps, own);
            norm(own, nullptr, block.gains[2], width, pass.eps, narrow + r * width);
        }
        float* inner = pass.packs ? wide : narrow;  // what is gated tile by tile cannot be written over its source
        if (pass.packs) {
            layer.into_hidden.multiply_gated({narrow, width}, rows, inner, hidden);
        } else {
            layer.into_hidden.multiply({narrow, width}, rows, 2 * hidden, wide, 2 * hidden);
            for (int64_t r = 0; r < rows; ++r) gate(wide + r * 2 * hidden, hidden, inner + r * hidden);
        }
        float* output = pass.packs ? narrow : wide;
        layer.out_of_hidden.multiply({inner, hidden}, rows, width, output, width);
        for (int64_t r = 0; r < rows; ++r)
            norm(output + r * width, state + r * width, block.gains[3], width, pass.eps, state + r * width);
    }
}

// x = x A^T + injected, where A is the state's half of the adapter.
void adapt(const Pass& pass, const Weight& adapter, const Scratch& scratch, int64_t begin, int64_t end, float* x) {
    const int64_t width = pass.width;
    float* wide = scratch.wide.get();
    for (int64_t from = begin; from < end; from += scratch.chunk) {
        const int64_t rows = std::min(scratch.chunk, end - from);
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
    const Rows adapter_rows{pass->adapter, 2 * pass->width};
    const Weight adapter = pass->packs && pass->adapter ? Weight::packed(adapter_rows, pass->width, pass->width)
                                                        : Weight(adapter_rows, pass->width, pass->width);
    std::vector<Layer> layers;
    for (int64_t i = 0; i < pass->layers; ++i) layers.emplace_back(*pass, pass->blocks[i]);
    for (int64_t step = 0; step < pass->steps; ++step) {
        if (pass->adapter) adapt(*pass, adapter, scratch, first * pass->tokens, last * pass->tokens, x);
        for (int64_t i = 0; i < pass->layers; ++i)
            through(*pass, pass->blocks[i], layers[i], scratch, pass->slots[step] + i, first, last, x);
    }
}

// A block's products into `panels`, of as many floats as they have together.
extern "C" void fourfold_pack(const Block* block, int64_t width, int64_t hidden, float* panels) {
    const auto pack = [&](const float* from, int64_t outputs, int64_t inner, int64_t half) {
        Weight::pack({from, inner}, outputs, inner, half, panels);
        panels += outputs * inner;
    };
    pack(block->into_heads, 3 * width, width, 0);
    pack(block->out_of_heads, width, width, 0);
    pack(block->into_hidden, 2 * hidden, width, hidden);
    pack(block->out_of_hidden, width, hidden, 0);
}
