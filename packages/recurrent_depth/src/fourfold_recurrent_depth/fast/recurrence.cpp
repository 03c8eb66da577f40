// Sandwich blocks on a CPU, without gradient: one call for all recurrences of a pass.
//
// The arithmetic is that of the modules in `model.py`, in float32. Weights are read as torch holds them, [out, in];
// where the rows have many tokens they are packed once for a forward pass, so that no copy can be stale. In which
// order a product sums depends on the tokens of a row, never on how many rows are computed together: a row's numbers
// are its own.
// `compiled.py` makes the arguments, and says there what this file does not take.
#include "products.h"

#include <vector>

namespace {

constexpr int64_t CHUNK = 144;   // rows that go through the products of a block together, and stay in a cache
constexpr int64_t QUERIES = 12;  // tokens whose scores are held together
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// The structures below are mirrored in compiled.py.

struct Block {
    const float *gains[4];
    const float *into_heads, *bias, *out_of_heads, *into_hidden, *out_of_hidden;
    const float* panels;  // the four products packed, one behind the other, or null
};

// A row with memory of its own, by slot, head, token; at a place and a recurrence of its own.
struct Line {
    float *keys, *values;
    int64_t slot_stride, head_stride;
    int64_t held;        // its tokens before the pass
    int64_t steps;       // recurrences that have slots
    int64_t done;        // recurrences of its new token before the pass
    int64_t* depths;     // recurrences of each token, and so the slots of it that hold something
    int64_t shallowest;  // the least of them
};

// Keys and values by slot, row, head, token; `rows` says which row of the store each row of the pass is.
struct Store {
    float *keys, *values;
    int64_t first_slot, slot_stride, row_stride, head_stride;
    const int64_t* rows;

    struct Head {
        float *keys, *values;
    };

    Head at(int64_t slot, int64_t row, int64_t head) const {
        const int64_t place =
            (slot - first_slot) * slot_stride + (rows ? rows[row] : row) * row_stride + head * head_stride;
        return {keys + place, values + place};
    }
};

struct Pass {
    int64_t tokens, width, heads, hidden, longest, layers, steps, rotary_row, rotary_token, mask_row, mask_query;
    int64_t packs, around;
    const Block* blocks;
    const int64_t* slots;    // of each step's first layer
    const float* adapter;    // [width, 2 width], or null: the blocks alone
    const float* injected;   // the embedding's share of each recurrence
    const float* rotary;     // (cos, sin) pairs
    const uint8_t* mask;     // null is causal
    const uint8_t* running;  // null, or which tokens still write their keys
    Store cached, own;
    const Line* lines;  // null, or what is held of each row, instead of both stores
    float eps;

    int64_t head_width() const { return width / heads; }
    int64_t held(int64_t row) const { return lines ? lines[row].held : longest; }

    // The kept recurrence that a step is for a row with a line; -1 where layers have one slot alone.
    int64_t kept(int64_t row, int64_t step) const {
        return lines && adapter ? (lines[row].done + step) % lines[row].steps : -1;
    }

    // The slot of a step's first layer.
    int64_t slot(int64_t row, int64_t step) const {
        const int64_t own = kept(row, step);
        return own < 0 ? slots[step] : around + own * layers;
    }

    Store::Head before(int64_t slot, int64_t row, int64_t head) const {
        return lines ? of(lines[row], slot, head) : cached.at(slot, row, head);
    }

    Store::Head now(int64_t slot, int64_t row, int64_t head) const {
        if (!lines) return own.at(slot, row, head);
        const int64_t behind = lines[row].held * head_width();
        const Store::Head first = of(lines[row], slot, head);
        return {first.keys + behind, first.values + behind};
    }

    static Store::Head of(const Line& line, int64_t slot, int64_t head) {
        const int64_t place = slot * line.slot_stride + head * line.head_stride;
        return {line.keys + place, line.values + place};
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
    Floats queries, wide, narrow, scores, keys, values;

    Scratch(const Pass& pass, int64_t rows)
        : chunk(part(rows * pass.tokens)),
          queries(floats(rows * pass.tokens * pass.width)),
          wide(floats(chunk * std::max(3 * pass.width, (pass.packs ? 1 : 2) * pass.hidden))),
          narrow(floats(chunk * std::max(pass.width, pass.hidden))),
          scores(floats(QUERIES * stride(pass))),
          keys(floats(pass.lines ? stride(pass) * pass.head_width() : 0)),
          values(floats(pass.lines ? stride(pass) * pass.head_width() : 0)) {}

    static int64_t stride(const Pass& pass) { return whole(pass.longest + pass.tokens) + LANES; }
};

// One head of a row with a line at a recurrence that some of its tokens did not take: these are read at their last.
void gather(const Pass& pass, const Scratch& scratch, int64_t slot, int64_t kept, int64_t row, int64_t head) {
    const Line& line = pass.lines[row];
    const int64_t head_width = pass.head_width(), bytes = head_width * sizeof(float);
    for (int64_t t = 0; t <= line.held; ++t) {
        const int64_t own = t < line.held ? std::min(kept, line.depths[t] - 1) : kept;
        const Store::Head from = Pass::of(line, slot - (kept - own) * pass.layers, head);
        std::memcpy(scratch.keys.get() + t * head_width, from.keys + t * head_width, bytes);
        std::memcpy(scratch.values.get() + t * head_width, from.values + t * head_width, bytes);
    }
}

// One head of one row: queries become what they read.
void attend(const Pass& pass, const Scratch& scratch, int64_t slot, int64_t kept, int64_t row, int64_t head,
            float* queries) {
    const int64_t head_width = pass.head_width(), stride = Scratch::stride(pass);
    const float scaling = 1 / std::sqrt(static_cast<float>(head_width));
    const int64_t held = pass.held(row);
    const Store::Head own = pass.now(slot, row, head);
    const float *keys = own.keys, *values = own.values, *held_keys = keys, *held_values = values;
    int64_t apart = held;  // keys that do not lie in one stretch with the pass's own
    if (kept >= 0 && kept >= pass.lines[row].shallowest) {
        gather(pass, scratch, slot, kept, row, head);
        keys = held_keys = scratch.keys.get();
        values = held_values = scratch.values.get();
        apart = 0;
    } else if (apart) {
        const Store::Head before = pass.before(slot, row, head);
        held_keys = before.keys;
        held_values = before.values;
        if (keys == held_keys + apart * head_width) {
            keys = held_keys;
            values = held_values;
            apart = 0;
        }
    }
    const int64_t together = held + pass.tokens - apart;
    const Rows key_rows{keys, head_width};
    const Weight held_weight({held_keys, head_width}, apart, head_width);
    const Weight weight = pass.packs ? Weight::packed(key_rows, together, head_width)
                                     : Weight(key_rows, together, head_width);
    for (int64_t first = 0; first < pass.tokens; first += QUERIES) {
        const int64_t count = std::min(QUERIES, pass.tokens - first);
        const int64_t all = held + (pass.mask ? pass.tokens : first + count);
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
            const int64_t until = pass.mask ? all : held + first + r + 1;
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
        const Store::Head kept = pass.now(slot, row, head);
        turn(projected + width + at, block.bias + width + at, rotary, head_width, kept.keys + token * head_width);
        std::memcpy(kept.values + token * head_width, projected + 2 * width + at, head_width * sizeof(float));
    }
}

// One block on the rows first .. last - 1 of the pass, in place; x is that of row 0.
void through(const Pass& pass, int64_t number, const Layer& layer, const Scratch& scratch, int64_t step, int64_t first,
             int64_t last, float* x) {
    const Block& block = pass.blocks[number];
    const int64_t width = pass.width, hidden = pass.hidden, begin = first * pass.tokens, end = last * pass.tokens;
    float *queries = scratch.queries.get(), *wide = scratch.wide.get(), *narrow = scratch.narrow.get();
    for (int64_t from = begin; from < end; from += scratch.chunk) {
        const int64_t rows = std::min(scratch.chunk, end - from);
        for (int64_t r = 0; r < rows; ++r)
            norm(x + (from + r) * width, nullptr, block.gains[0], width, pass.eps, narrow + r * width);
        layer.into_heads.multiply({narrow, width}, rows, 3 * width, wide, 3 * width);
        for (int64_t r = 0; r < rows; ++r)
            into_heads(pass, block, pass.slot((from + r) / pass.tokens, step) + number, from + r, wide + r * 3 * width,
                       queries + (from + r - begin) * width);
    }
    for (int64_t row = first; row < last; ++row)
        for (int64_t head = 0; head < pass.heads; ++head)
            attend(pass, scratch, pass.slot(row, step) + number, pass.kept(row, step), row, head,
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
    if (first == last) return;  // a batch of no rows
    const Scratch scratch(*pass, last - first);
    const Rows adapter_rows{pass->adapter, 2 * pass->width};
    const Weight adapter = pass->packs && pass->adapter ? Weight::packed(adapter_rows, pass->width, pass->width)
                                                        : Weight(adapter_rows, pass->width, pass->width);
    std::vector<Layer> layers;
    for (int64_t i = 0; i < pass->layers; ++i) layers.emplace_back(*pass, pass->blocks[i]);
    for (int64_t step = 0; step < pass->steps; ++step) {
        if (pass->adapter) adapt(*pass, adapter, scratch, first * pass->tokens, last * pass->tokens, x);
        for (int64_t i = 0; i < pass->layers; ++i)
            through(*pass, i, layers[i], scratch, step, first, last, x);
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

// The new tokens of some rows stop where they are: they are cached now, and the next ones begin.
extern "C" void fourfold_close(Line* lines, const int64_t* rows, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        Line& line = lines[rows[i]];
        line.depths[line.held++] = line.done;
        line.shallowest = std::min(line.shallowest, line.done);
        line.done = 0;
    }
}
