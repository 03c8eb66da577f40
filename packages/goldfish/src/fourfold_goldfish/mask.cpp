// The ordered hash of `loss.py`, token by token: a window slides along a row, so its length costs nothing.
//
// hash = sum over the window of (token + 1) * BASE^(tokens behind it), modulo 2^64. A token that enters multiplies
// the sum; one that leaves is subtracted with BASE^context. Plain 64-bit multiplications, of which a processor begins
// one a cycle: vectors of them are slower everywhere.
#include <algorithm>
#include <cstdint>

namespace {

constexpr uint64_t BASE = 0x2545F4914F6CDD1D, SPREAD = 0x9E3779B97F4A7C15;

// Mirrored in compiled_mask.py.
struct Mask {
    int64_t row, context, sees_target;
    int64_t is_reset, is_prefix;  // what a window does where a document begins
    uint64_t key;
    int64_t below;  // a mixed word that is smaller leaves its target out
};

// The first two rounds of splitmix64's finaliser.
inline uint64_t mixed(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
    return (word ^ (word >> 27)) * 0x94D049BB133111EB;
}

uint64_t power(uint64_t base, int64_t exponent) {
    uint64_t result = 1;
    for (; exponent; exponent >>= 1, base *= base)
        if (exponent & 1) result *= base;
    return result;
}

// Whole windows; gives a negative number where any token is one.
template <typename T>
int64_t slide(const Mask& m, const T* row, const int64_t* documents, uint8_t* dropped) {
    const int64_t first = m.context - m.sees_target;  // the first target whose window is whole
    const uint64_t leaving = power(BASE, m.context);
    uint64_t hash = 0;
    int64_t signs = 0, at = 0;
    const auto enter = [&](int64_t place) {
        signs |= row[place];
        hash = hash * BASE + static_cast<uint64_t>(row[place]) + 1;
    };
    for (; at < std::min(m.context, m.row); ++at) enter(at);
    for (int64_t target = first; target < m.row; ++target) {
        dropped[target] = static_cast<int64_t>(mixed(hash * SPREAD + m.key)) < m.below;
        if (at == m.row) break;
        enter(at);
        hash -= (static_cast<uint64_t>(row[at - m.context]) + 1) * leaving;
        ++at;
    }
    for (int64_t target = first; m.is_reset && target < m.row; ++target)
        dropped[target] &= documents[target] == documents[target - first];
    return signs;
}

// Windows that begin where their document does, at most `context` tokens before their end; an empty one decides nothing.
template <typename T>
int64_t grow(const Mask& m, const T* row, const int64_t* documents, uint8_t* dropped) {
    const uint64_t leaving = power(BASE, m.context);
    uint64_t hash = 0;
    int64_t signs = 0, held = 0;
    const auto enter = [&](int64_t at) {
        signs |= row[at];
        hash = hash * BASE + static_cast<uint64_t>(row[at]) + 1;
        if (++held <= m.context) return;
        hash -= (static_cast<uint64_t>(row[at - m.context]) + 1) * leaving;
        held = m.context;
    };
    for (int64_t at = 0; at < m.row; ++at) {
        if (documents && at && documents[at] != documents[at - 1]) hash = held = 0;
        if (m.sees_target) enter(at);
        dropped[at] = held && static_cast<int64_t>(mixed(hash * SPREAD + m.key)) < m.below;
        if (!m.sees_target) enter(at);
    }
    return signs;
}

template <typename T>
int64_t drop(const Mask& m, const T* tokens, const int64_t* documents, uint8_t* dropped, int64_t from,
             int64_t until) {
    int64_t signs = 0;
    for (int64_t r = from; r < until; ++r) {
        const int64_t* own = documents ? documents + r * m.row : nullptr;
        signs |= (m.is_prefix ? grow<T> : slide<T>)(m, tokens + r * m.row, own, dropped + r * m.row);
    }
    return signs;
}

}  // namespace

// Rows from .. until - 1 of `dropped`, which holds zeros; a negative result says that a token is negative.
extern "C" int64_t fourfold_goldfish_drop(const Mask* mask, const void* tokens, int32_t are_long,
                                          const int64_t* documents, uint8_t* dropped, int64_t from,
                                          int64_t until) {
    return are_long ? drop(*mask, static_cast<const int64_t*>(tokens), documents, dropped, from, until)
                    : drop(*mask, static_cast<const int32_t*>(tokens), documents, dropped, from, until);
}
