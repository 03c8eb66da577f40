// Vectors as wide as a register of the instruction set that this is compiled for, and what is computed with them.
//
// Written in the compilers' own vectors (GCC, Clang), so one text serves every instruction set. Only the constants
// below know which one it is: how many lanes a register has, how many registers there are, and how many sums may be
// held in them. A kernel that takes its blocks from these constants spills none.
#ifndef FOURFOLD_VECTORS_H
#define FOURFOLD_VECTORS_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, REGISTERS = 16;
#elif defined(__ARM_FEATURE_SVE_BITS) && __ARM_FEATURE_SVE_BITS > 0 && __ARM_FEATURE_SVE_BITS <= 512
constexpr int64_t LANES = __ARM_FEATURE_SVE_BITS / 32, REGISTERS = 32;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4, REGISTERS = 32;
#else
constexpr int64_t LANES = 4, REGISTERS = 16;
#endif
constexpr int64_t SUMS = REGISTERS / 2;  // sums held at a time; the other half is for what goes into them
constexpr int64_t LINE = 64;             // bytes that a processor fetches at once

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Words __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef float SomeLanes __attribute__((vector_size(LANES / 2 * sizeof(float))));
typedef double Doubles __attribute__((vector_size(LANES / 2 * sizeof(double))));
typedef int64_t Longs __attribute__((vector_size(LANES / 2 * sizeof(int64_t))));

struct BFloat16 {
    uint16_t bits;
};

struct Free {
    void operator()(float* memory) const { operator delete[](memory, std::align_val_t{LINE}); }
};
using Floats = std::unique_ptr<float[], Free>;
// Vectors that lie across lines of the cache are read at half the speed.
inline Floats floats(int64_t count) { return Floats(new (std::align_val_t{LINE}) float[count]); }

template <typename To, typename From>
inline To as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline Lanes load(const float* from) {
    Lanes value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// A bfloat16 is the upper half of a float32.
inline Lanes load(const BFloat16* from) {
    Halves half;
    std::memcpy(&half, from, sizeof half);
    return as<Lanes>(__builtin_convertvector(half, Words) << 16);
}

inline void store(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }

// Ask for memory that is read soon, into the nearest cache.
inline void fetch(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(static_cast<const char*>(from) + at);
}

constexpr int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Where lane J of a fold comes from: runs of HALF lanes of a, then of b, and what is added lies HALF further.
template <int64_t HALF>
constexpr int pick(int64_t lane, int64_t further) {
    const int64_t within = lane % (2 * HALF);
    const int64_t from = lane - within + within % HALF + further * HALF;
    return static_cast<int>(within < HALF ? from : from + LANES);
}

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
inline Lanes added(Lanes a, Lanes b) { return a + b; }

template <Lanes (*COMBINE)(Lanes, Lanes), int64_t HALF, size_t... J>
inline Lanes fold(Lanes a, Lanes b, std::index_sequence<J...>) {
    return COMBINE(__builtin_shufflevector(a, b, pick<HALF>(J, 0)...),
                   __builtin_shufflevector(a, b, pick<HALF>(J, 1)...));
}

// Lane j of the result is what the lanes of parts[j] give together; `parts` are LANES vectors, and are lost.
template <Lanes (*COMBINE)(Lanes, Lanes) = added, int64_t HALF = LANES / 2>
inline Lanes folded(Lanes* parts) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < HALF; ++i)
        parts[i] = fold<COMBINE, HALF>(parts[i], parts[i + HALF], std::make_index_sequence<LANES>());
    if constexpr (HALF > 1) return folded<COMBINE, HALF / 2>(parts);
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
    power = as<Lanes>(as<Words>(power) + (as<Words>(shifted) << 23));
    return x < least ? Lanes{} : power;
}

inline Lanes silu(Lanes x) { return x / (1.0f + exponential(-x)); }

// e^x for x <= 0 over the range of a double, to 11 digits; 0 below -700.
inline Doubles wide_exponential(Doubles x) {
    const Doubles least = Doubles{} - 700.0;
    const Doubles within = x < least ? least : x;
    const double round = 6755399441055744.0;  // 1.5 * 2^52, as above
    const Doubles shifted = within * 1.4426950408889634 + round;
    const Doubles n = shifted - round;
    const Doubles r = (within - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    Doubles power = r * (1.0 / 362880) + 1.0 / 40320;
    const double factors[] = {1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1, 1};
#pragma GCC unroll 8
    for (const double factor : factors) power = power * r + factor;
    power = as<Doubles>(as<Longs>(power) + (as<Longs>(shifted) << 52));
    return x < least ? Doubles{} : power;
}

}  // namespace

#endif
