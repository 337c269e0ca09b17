// Tiles of quantized weights: codes times codes in integers.
#include "linear.h"
#include "linear_tile.h"
#include "vec.h"

namespace {

struct StepU8 {
    using Sum = i32x16;
    static constexpr int64_t x_bytes = 4, vector_bytes = 64;
    template <int R, int V> INLINE void add(Sum (&sums)[R][V], const uint8_t* weight, const uint8_t* const (&x)[R]) {
        u8x64 w[V];
        for (int v = 0; v < V; ++v) w[v] = load_codes(weight + 64 * v);
        for (int r = 0; r < R; ++r) {
            i32x16 b = broadcast_four(reinterpret_cast<const int8_t*>(x[r]));
            for (int v = 0; v < V; ++v) sums[r][v] = dot_u8s8(sums[r][v], w[v], b);
        }
    }
};

struct StepU4 {
    using Sum = i32x16;
    static constexpr int64_t x_bytes = 8, vector_bytes = 64;
    template <int R, int V> INLINE void add(Sum (&sums)[R][V], const uint8_t* weight, const uint8_t* const (&x)[R]) {
        for (int half = 0; half < 2; ++half) {
            u8x64 w[V];
            for (int v = 0; v < V; ++v) {
                u8x64 both = load_codes(weight + 64 * v);
                w[v] = (half ? both >> 4 : both) & 15;
            }
            for (int r = 0; r < R; ++r) {
                i32x16 b = broadcast_four(reinterpret_cast<const int8_t*>(x[r]) + 4 * half);
                for (int v = 0; v < V; ++v) sums[r][v] = dot_u4s8(sums[r][v], w[v], b);
            }
        }
    }
};

// Adds the groups' sums, scaled, to the sums in f32.
template <bool OFFSETS, int R, int V>
INLINE void add_groups(const i32x16 (&sums)[R][V], float* totals, const float* scales, const float* offsets,
                       const GroupOfX* x, int64_t x_stride) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        const f32x16 scale = load(scales + 16 * v);
        const f32x16 offset = OFFSETS ? load(offsets + 16 * v) : zero();
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            float* p = totals + 64 * r + 16 * v;
            const GroupOfX* g = x + r * x_stride;
            f32x16 total = fma(to_f32(sums[r][v]) * broadcast(g->scale), scale, load(p));
            if (OFFSETS) total = fma(offset, broadcast(g->weight), total);
            store(p, total);
        }
    }
}

// An integer sum per group.
template <class Step, int R> void run_groups(const Tile& tile) {
    constexpr int V = vectors_at_once(R);
    const int64_t group_steps = tile.group_steps, num_groups = tile.num_steps / group_steps;
    const int64_t x_stride = tile.x_num_groups;
    for (int first = 0; first < 4; first += V) {
        const uint8_t* weight = tile.weight + Step::vector_bytes * first;
        Fetch fetch = {tile.prefetch, first == 0 ? tile.prefetches : 0};
        const GroupOfX* x = tile.x_groups;
        const float *scales = tile.scale + 16 * first, *offsets = tile.offset ? tile.offset + 16 * first : nullptr;
        float* totals = tile.sums + 16 * first;
        const i32x16 taken_off = broadcast(-tile.zero);
        const uint8_t* rows[R];
        for (int r = 0; r < R; ++r) rows[r] = tile.x + r * tile.x_stride;
        for (int64_t g = 0; g < num_groups; ++g) {
            // The totals stay where they are, rather than in copies on the stack: the integers fill the registers.
            __asm__ volatile("" ::: "memory");
            i32x16 sums[R][V];
            for (int r = 0; r < R; ++r) {
                const i32x16 start = tile.zero ? broadcast(x[r * x_stride].sum) * taken_off : i32x16{};
                for (int v = 0; v < V; ++v) sums[r][v] = start;
            }
            accumulate<Step, R, V>(sums, weight, rows, group_steps, fetch);
            weight += group_steps * STEP_BYTES;
            for (int r = 0; r < R; ++r) rows[r] += group_steps * Step::x_bytes;
            if (offsets) {
                add_groups<true, R, V>(sums, totals, scales, offsets, x, x_stride);
                offsets += PANEL;
            } else {
                add_groups<false, R, V>(sums, totals, scales, nullptr, x, x_stride);
            }
            scales += PANEL;
            ++x;
        }
    }
}

}  // namespace

const TileFunction integer_tiles[4][MAX_TILE_ROWS] = {
    {run<StepU8, 1>, run<StepU8, 2>, run<StepU8, 3>, run<StepU8, 4>, run<StepU8, 5>, run<StepU8, 6>},
    {run<StepU4, 1>, run<StepU4, 2>, run<StepU4, 3>, run<StepU4, 4>, run<StepU4, 5>, run<StepU4, 6>},
    {run_groups<StepU8, 1>, run_groups<StepU8, 2>, run_groups<StepU8, 3>, run_groups<StepU8, 4>,
     run_groups<StepU8, 5>, run_groups<StepU8, 6>},
    {run_groups<StepU4, 1>, run_groups<StepU4, 2>, run_groups<StepU4, 3>, run_groups<StepU4, 4>,
     run_groups<StepU4, 5>, run_groups<StepU4, 6>},
};
