// The loops of a tile: R rows times V of the panel's four vectors, their sums in registers.
#pragma once

#include "linear.h"
#include "vec.h"

#if defined(__AVX512F__)
constexpr int vectors_at_once(int) { return 4; }  // 24 of 32 registers for 6 rows
#else
constexpr int vectors_at_once(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// What a tile fetches while it computes: lines of `at`, so many for every four steps, or what comes AHEAD in its own
// stream.
constexpr int64_t AHEAD_BYTES = 8192;
struct Fetch {
    const uint8_t* at;
    int64_t lines;
};

template <class Step, int R, int V>
INLINE void add_step(typename Step::Sum (&sums)[R][V], const uint8_t* weight, const uint8_t* (&x)[R]) {
    Step::template add<R, V>(sums, weight, x);
    for (int r = 0; r < R; ++r) x[r] += Step::x_bytes;
}

// Adds `steps` steps to the sums.
template <class Step, int R, int V>
INLINE void accumulate(typename Step::Sum (&sums)[R][V], const uint8_t* weight, const uint8_t* const (&rows)[R],
                       int64_t steps, Fetch& fetch) {
    const uint8_t* x[R];
    for (int r = 0; r < R; ++r) x[r] = rows[r];
    int64_t s = 0;
    if (fetch.lines == AHEAD) {
#pragma GCC unroll 2
        for (; s < steps; ++s, weight += STEP_BYTES) {
            for (int i = 0; i < 4; ++i) prefetch(weight + AHEAD_BYTES + 64 * i);
            add_step<Step, R, V>(sums, weight, x);
        }
        return;
    }
    for (; s + 4 <= steps; s += 4) {
        for (int64_t i = 0; i < fetch.lines; ++i) prefetch(fetch.at + 64 * i);
        fetch.at += 64 * fetch.lines;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) add_step<Step, R, V>(sums, weight + i * STEP_BYTES, x);
        weight += 4 * STEP_BYTES;
    }
    for (; s < steps; ++s, weight += STEP_BYTES) add_step<Step, R, V>(sums, weight, x);
}

// One accumulator per output from the first step to the last.
template <class Step, int R> void run(const Tile& tile) {
    constexpr int V = vectors_at_once(R);
    for (int first = 0; first < 4; first += V) {
        typename Step::Sum sums[R][V];
        const uint8_t* rows[R];
        for (int r = 0; r < R; ++r) {
            rows[r] = tile.x + r * tile.x_stride;
            for (int v = 0; v < V; ++v) read(sums[r][v], tile.sums + 64 * r + 16 * (first + v));
        }
        Fetch fetch = {tile.prefetch, first == 0 ? tile.prefetches : 0};
        accumulate<Step, R, V>(sums, tile.weight + Step::vector_bytes * first, rows, tile.num_steps, fetch);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) write(tile.sums + 64 * r + 16 * (first + v), sums[r][v]);
    }
}
