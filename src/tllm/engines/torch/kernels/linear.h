// A linear y = x W^T + b whose weight is laid out for the processor, and what its sources share.
//
// A weight (N, K) is cut in panels of 64 outputs, four vectors of 16 lanes; N and K are filled up with zeros. A panel is
// a sequence of steps along K of 256 bytes each, so that a product reads memory from one end to the other:
//
//     F32               1 input   [4][16]      f32
//     F16               2 inputs  [2][4][16]   f16
//     BF16              2 inputs  [4][16][2]   bf16
//     U8, GROUPED_U8    4 inputs  [4][16][4]   codes
//     U4, GROUPED_U4    8 inputs  [4][16][4]   bytes: the low half is input i, the high half input 4 + i
//
// value[n, k] = scale[n, g] * code + offset[n, g], g = k / group; without offsets code - 128 (or - 8) takes the code's
// place. Scales and offsets are [panel][group][64]; U8 and U4 have one group, their sums stay integers to the end.
//
// Every output has one accumulator that goes through K in order, however many rows there are, however K is cut and
// whichever thread computes it: a row's result depends on that row alone.
#pragma once

#include <cstdint>

enum Type : int32_t { TYPE_F32, TYPE_BF16, TYPE_F16 };
enum Kind : int32_t { F32, F16, BF16, U8, U4, GROUPED_U8, GROUPED_U4 };
enum Format : int32_t { FORMAT_F32, FORMAT_BF16, FORMAT_S8, FORMAT_GROUPED_S8 };  // of prepared activations
enum Activation : int32_t { NO_ACTIVATION, SILU, GELU, GELU_TANH };

constexpr int64_t PANEL = 64, STEP_BYTES = 256;
constexpr int MAX_TILE_ROWS = 6;
constexpr int64_t AHEAD = -1;  // a tile fetches what comes next in its own stream

constexpr int step_inputs(Kind kind) {
    return kind == F32 ? 1 : kind == F16 || kind == BF16 ? 2 : kind == U8 || kind == GROUPED_U8 ? 4 : 8;
}
constexpr bool is_grouped(Kind kind) { return kind == GROUPED_U8 || kind == GROUPED_U4; }
constexpr bool is_integer(Kind kind) { return kind == U8 || kind == U4; }
constexpr int64_t num_panels(int64_t num_rows) { return (num_rows + PANEL - 1) / PANEL; }
constexpr int64_t num_steps(Kind kind, int64_t num_inputs) {
    return (num_inputs + step_inputs(kind) - 1) / step_inputs(kind);
}

// What belongs to a row's or group's codes: x = scale * code.
struct GroupOfX {
    float scale;
    float weight;  // scale * sum
    int32_t sum;   // of the codes
    int32_t unused;
};

// A few rows times a few steps of one panel, added to `sums`.
struct Tile {
    const uint8_t* weight;
    const uint8_t* x;  // prepared activations of the first row at the first step
    int64_t x_stride;  // bytes
    int64_t num_steps;
    float* sums;  // [rows][64]; integers for U8 and U4
    const uint8_t* prefetch;  // what will be needed soon
    int64_t prefetches;       // lines of it for every four steps, or AHEAD
    // Grouped: num_steps is a multiple of group_steps.
    int64_t group_steps;
    const float* scale;   // [groups][64]
    const float* offset;  // [groups][64] or null
    const GroupOfX* x_groups;  // [rows][x_num_groups] from the first group on
    int64_t x_num_groups;
    int32_t zero;  // what is taken off every code: 128, 8, or 0 beside offsets
};
using TileFunction = void (*)(const Tile&);

extern const TileFunction plain_tiles[3][MAX_TILE_ROWS];    // by Kind F32.. and rows - 1
extern const TileFunction integer_tiles[4][MAX_TILE_ROWS];  // by Kind U8..

// ---- what Python fills in; linear.py mirrors these

struct Part {
    const uint8_t* weight;
    const void* scale;
    const void* offset;
    int64_t num_rows;
    int64_t num_inputs;
    int32_t kind;
    int32_t scale_type;
    int32_t group;
    int32_t preparation;
};
struct Preparation {
    const int32_t* order;  // the inputs in the order in which the weight has them, or null
    int32_t format;
    int32_t group;
};
struct Linear {
    const Part* parts;
    const Preparation* preparations;
    const float* bias;
    int64_t num_inputs;
    int64_t num_bytes;
    int32_t num_parts;
    int32_t num_preparations;
};
struct Norm {
    const float* weight;
    const float* bias;  // of a layer norm; null for an RMS norm
    float eps;
};
