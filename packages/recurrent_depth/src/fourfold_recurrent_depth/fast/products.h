// Products with rows: y = x w^T, in blocks that follow from the instruction set.
#include "fourfold/vectors.h"

#include <type_traits>

namespace {

constexpr int64_t AHEAD = 1024;  // weights that are fetched before they are needed, at least

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
    store(found, folded(total));
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

}  // namespace
