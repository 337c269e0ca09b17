// Tiles of weights in f32, f16 and bf16.
#include "linear.h"
#include "linear_tile.h"
#include "vec.h"

namespace {

struct StepF32 {
    using Sum = f32x16;
    static constexpr int64_t x_bytes = 4, vector_bytes = 64;
    template <int R, int V> INLINE void add(Sum (&sums)[R][V], const uint8_t* weight, const uint8_t* const (&x)[R]) {
        f32x16 w[V];
        for (int v = 0; v < V; ++v) w[v] = load(reinterpret_cast<const float*>(weight) + 16 * v);
        for (int r = 0; r < R; ++r) {
            f32x16 b = broadcast(*reinterpret_cast<const float*>(x[r]));
            for (int v = 0; v < V; ++v) sums[r][v] = fma(w[v], b, sums[r][v]);
        }
    }
};

struct StepF16 {
    using Sum = f32x16;
    static constexpr int64_t x_bytes = 8, vector_bytes = 32;
    template <int R, int V> INLINE void add(Sum (&sums)[R][V], const uint8_t* weight, const uint8_t* const (&x)[R]) {
        for (int k = 0; k < 2; ++k) {
            f32x16 w[V];
            for (int v = 0; v < V; ++v) w[v] = load(reinterpret_cast<const f16*>(weight) + 64 * k + 16 * v);
            for (int r = 0; r < R; ++r) {
                f32x16 b = broadcast(reinterpret_cast<const float*>(x[r])[k]);
                for (int v = 0; v < V; ++v) sums[r][v] = fma(w[v], b, sums[r][v]);
            }
        }
    }
};

struct StepBF16 {
    using Sum = f32x16;
    static constexpr int64_t x_bytes = 4, vector_bytes = 64;
    template <int R, int V> INLINE void add(Sum (&sums)[R][V], const uint8_t* weight, const uint8_t* const (&x)[R]) {
        u16x32 w[V];
        for (int v = 0; v < V; ++v) w[v] = load_pairs(reinterpret_cast<const bf16*>(weight) + 32 * v);
        for (int r = 0; r < R; ++r) {
            u16x32 b = broadcast_pair(reinterpret_cast<const bf16*>(x[r]));
            for (int v = 0; v < V; ++v) sums[r][v] = dot_bf16(sums[r][v], w[v], b);
        }
    }
};

}  // namespace

const TileFunction plain_tiles[3][MAX_TILE_ROWS] = {
    {run<StepF32, 1>, run<StepF32, 2>, run<StepF32, 3>, run<StepF32, 4>, run<StepF32, 5>, run<StepF32, 6>},
    {run<StepF16, 1>, run<StepF16, 2>, run<StepF16, 3>, run<StepF16, 4>, run<StepF16, 5>, run<StepF16, 6>},
    {run<StepBF16, 1>, run<StepBF16, 2>, run<StepBF16, 3>, run<StepBF16, 4>, run<StepBF16, 5>, run<StepBF16, 6>},
};
