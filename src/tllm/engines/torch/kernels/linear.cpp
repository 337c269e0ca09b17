// The product of rows and a linear, with the norm before it and what comes after it, in one parallel region.
//
// Rows are prepared first, once for each format that the parts need: normalised, rounded to the model's type, then kept
// as f32 or bf16 or quantized to s8 with one scale per row or per group. Then every thread takes panels. Within a panel
// K is cut in blocks that stay in the nearest cache while all rows pass, and a block's passes fetch the block after it.
//
//     rows of x --prepare--> [format][block of K][row][block]
//     panels of W --tile--> sums [row][64] --finish--> rows of y
#include <omp.h>

#include <atomic>
#include <cmath>

#include "linear.h"
#include "scratch.h"
#include "vec.h"

namespace {

constexpr int64_t MAX_BLOCK_STEPS = 128;    // of one panel: 32 KB
constexpr int64_t SCALES_STEPS = 32;        // whose scales a single pass widens at once, while it fetches the next ones
constexpr int64_t MAX_ROWS = 256;           // prepared and summed at a time
constexpr double REGION_S = 5e-6;           // what one thread does in less, it does alone:
constexpr double THREAD_BYTES_PER_S = 25e9, THREAD_VECTORS_PER_S = 6e9;  // reads; multiplies

thread_local Scratch shared_scratch, own_scratch;

// ---- prepared activations

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t element_bytes(int32_t format) { return format == FORMAT_F32 ? 4 : format == FORMAT_BF16 ? 2 : 1; }

// Inputs of a block. A single pass has no blocks. Of two passes the first waits for memory and the second does not:
// blocks of 8 KB even that out. More passes compute longer than memory takes: 32 KB (F16 and U4 half as much). Groups
// are whole.
int64_t block_inputs(const Preparation& p, int64_t num_inputs, int64_t rows) {
    if (rows <= MAX_TILE_ROWS) return round_up(num_inputs, 16);
    const int64_t inputs = (rows <= 2 * MAX_TILE_ROWS ? 128 : 512) / element_bytes(p.format);
    return p.format == FORMAT_GROUPED_S8 ? (inputs / p.group > 1 ? inputs / p.group : 1) * p.group : inputs;
}

// Blocks of K after each other, in each all rows: passes over rows read memory in sequence.
struct Prepared {
    uint8_t* data;
    int64_t rows, inputs, block, bytes;  // inputs: K and the zeros behind it; bytes of one
    GroupOfX* groups;                    // [rows][num_groups]
    int64_t num_groups;

    int64_t block_stride(int64_t first) const { return smaller(block, inputs - first) * bytes; }
    // The inputs from `first` on, up to their block's end, of a row; other rows are `block_stride` apart.
    uint8_t* at(int64_t row, int64_t input) const {
        const int64_t first = input - input % block;
        return data + first * rows * bytes + row * block_stride(first) + (input - first) * bytes;
    }
    int64_t stride_at(int64_t input) const { return block_stride(input - input % block); }
};

Prepared place(const Preparation& p, int64_t num_inputs, int64_t rows, uint8_t* memory) {
    Prepared q;
    q.data = memory;
    q.rows = rows;
    q.inputs = round_up(num_inputs, 16);
    q.bytes = element_bytes(p.format);
    q.block = block_inputs(p, num_inputs, rows);
    q.groups = reinterpret_cast<GroupOfX*>(memory + round_up(rows * q.inputs * q.bytes, 64));
    q.num_groups = p.format == FORMAT_S8 ? 1 : p.format == FORMAT_GROUPED_S8 ? num_inputs / p.group : 0;
    return q;
}

int64_t prepared_bytes(const Preparation& p, int64_t num_inputs, int64_t rows) {
    const Prepared q = place(p, num_inputs, rows, nullptr);
    return round_up(rows * q.inputs * q.bytes, 64) + round_up(rows * q.num_groups * (int64_t)sizeof(GroupOfX), 64);
}

template <class T> void widen_row(const T* x, int64_t n, float* y) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(y + i, load(x + i));
    if (i < n) store(y + i, load(x + i, n - i));
}

// Rounds to T and back.
template <class T> void round_row(float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) store(y + i, widen(narrow(load(y + i), T{}), T{}));
}

float sum_of_squares(const float* y, int64_t n, float mean) {
    f32x16 sums[4] = {};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int j = 0; j < 4; ++j) {
            f32x16 d = load(y + i + 16 * j) - mean;
            sums[j] = fma(d, d, sums[j]);
        }
    for (; i < n; i += 16) {
        f32x16 d = n - i < 16 ? load(y + i, n - i) : load(y + i);
        d = select(lane_numbers() < (int32_t)(n - i), d - mean, zero());
        sums[0] = fma(d, d, sums[0]);
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

float sum_of_row(const float* y, int64_t n) {
    f32x16 sums[4] = {};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int j = 0; j < 4; ++j) sums[j] += load(y + i + 16 * j);
    for (; i < n; i += 16) sums[0] += n - i < 16 ? load(y + i, n - i) : load(y + i);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// y has room for whole vectors; `weight` and `bias` too.
void normalise(float* y, int64_t n, const Norm& norm) {
    const float mean = norm.bias ? sum_of_row(y, n) / n : 0.0f;
    const float scale = 1.0f / std::sqrt(sum_of_squares(y, n, mean) / n + norm.eps);
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 v = ((load(y + i) - mean) * scale) * load(norm.weight + i);
        store(y + i, norm.bias ? v + load(norm.bias + i) : v);
    }
}

float largest_magnitude(const float* y, int64_t n) {
    f32x16 most = zero();
    for (int64_t i = 0; i < n; i += 16) most = max(most, abs(load(y + i)));
    return largest(most);
}

// Codes of whole vectors of y, symmetric around zero.
i32x16 encode(const float* y, int64_t n, float inverse, uint8_t* codes) {
    i32x16 sums = {};
    for (int64_t i = 0; i < n; i += 16) {
        i32x16 q = round_to_int(load(y + i) * inverse);
        sums += q;
        u8x16 bytes = low_bytes(q);
        memcpy(codes + i, &bytes, 16);
    }
    return sums;
}

GroupOfX group_of(float range, i32x16 sums) {
    const int32_t total = sum(sums);
    const float scale = range / 127.0f;
    return {scale, scale * (float)total, total, 0};
}

// A row of `q.inputs` floats.
void keep_row(const float* y, const Preparation& p, const Prepared& q, int64_t row) {
    const float range = p.format == FORMAT_S8 ? largest_magnitude(y, q.inputs) : 0.0f;
    const float inverse = range > 0 ? 127.0f / range : 0.0f;
    i32x16 sums = {};
    for (int64_t first = 0; first < q.inputs; first += q.block) {
        const int64_t n = smaller(q.block, q.inputs - first);
        uint8_t* target = q.at(row, first);
        switch (p.format) {
            case FORMAT_F32: memcpy(target, y + first, 4 * n); break;
            case FORMAT_BF16:
                for (int64_t i = 0; i < n; i += 16) store(reinterpret_cast<bf16*>(target) + i, load(y + first + i));
                break;
            case FORMAT_S8: sums += encode(y + first, n, inverse, target); break;
            default:
                for (int64_t i = 0; i < n; i += p.group) {
                    const float most = largest_magnitude(y + first + i, p.group);
                    const float per_scale = most > 0 ? 127.0f / most : 0.0f;
                    q.groups[row * q.num_groups + (first + i) / p.group] =
                        group_of(most, encode(y + first + i, p.group, per_scale, target + i));
                }
        }
    }
    if (p.format == FORMAT_S8) q.groups[row] = group_of(range, sums);
}

struct Rows {
    const uint8_t* data;
    int64_t stride;  // bytes
    int32_t type;
};

struct Job {  // what a call is
    const Linear* linear;
    const Norm* norm;
    Rows x;
    uint8_t* out;
    int64_t out_stride;  // bytes
    int32_t out_type;
    const uint8_t* residual;
    int64_t residual_stride;
    int32_t activation;
    bool gated;
};

// `buffer` has room for two rows of K filled up to whole vectors.
void prepare_row(const Job& job, int64_t row, int64_t index, const Prepared* prepared, float* buffer) {
    const Linear& linear = *job.linear;
    const int64_t n = linear.num_inputs, whole = round_up(n, 16);
    const uint8_t* x = job.x.data + row * job.x.stride;
    store(buffer + whole - 16, zero());
    switch (job.x.type) {
        case TYPE_F32: widen_row(reinterpret_cast<const float*>(x), n, buffer); break;
        case TYPE_BF16: widen_row(reinterpret_cast<const bf16*>(x), n, buffer); break;
        default: widen_row(reinterpret_cast<const f16*>(x), n, buffer); break;
    }
    if (job.norm) {
        normalise(buffer, n, *job.norm);
        if (job.x.type == TYPE_BF16) round_row<bf16>(buffer, n);
        if (job.x.type == TYPE_F16) round_row<f16>(buffer, n);
        for (int64_t i = n; i < whole; ++i) buffer[i] = 0.0f;
    }
    for (int p = 0; p < linear.num_preparations; ++p) {
        const int32_t* order = linear.preparations[p].order;
        float* ordered = buffer + whole;
        if (order) {
            store(ordered + whole - 16, zero());
            for (int64_t i = 0; i < n; ++i) ordered[i] = buffer[order[i]];
        }
        keep_row(order ? ordered : buffer, linear.preparations[p], prepared[p], index);
    }
}

// ---- one panel

INLINE f32x16 load_scales(const void* scales, int32_t type, int64_t at) {
    switch (type) {
        case TYPE_F32: return load(static_cast<const float*>(scales) + at);
        case TYPE_BF16: return load(static_cast<const bf16*>(scales) + at);
        default: return load(static_cast<const f16*>(scales) + at);
    }
}

// Scales from `at` on as f32; those after them are needed next.
template <class T> void widen_scales(const T* scales, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) prefetch(scales + n + i);
    for (int64_t i = 0; i < n; i += 16) store(out + i, load(scales + i));
}
void widen_scales(const void* scales, int32_t type, int64_t at, int64_t n, float* out) {
    switch (type) {
        case TYPE_F32: return widen_scales(static_cast<const float*>(scales) + at, n, out);
        case TYPE_BF16: return widen_scales(static_cast<const bf16*>(scales) + at, n, out);
        default: return widen_scales(static_cast<const f16*>(scales) + at, n, out);
    }
}

int32_t zero_of(const Part& part) {
    if (part.offset) return 0;
    return part.kind == U8 || part.kind == GROUPED_U8 ? 128 : part.kind == U4 || part.kind == GROUPED_U4 ? 8 : 0;
}

// sums [rows][64] of one panel. `next` is the panel that this thread takes after it. `scales` has room for two blocks'.
void multiply(const Linear& linear, const Part& part, const Prepared& x, int64_t panel, int64_t rows, float* sums,
              float* scales, const uint8_t* next) {
    const Kind kind = (Kind)part.kind;
    const int64_t steps = num_steps(kind, linear.num_inputs);
    const uint8_t* weight = part.weight + panel * steps * STEP_BYTES;
    const int64_t num_tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    const TileFunction* tiles = kind <= BF16 ? plain_tiles[kind] : integer_tiles[kind - U8];
    const int32_t zero_code = zero_of(part);

    Tile tile = {};
    tile.zero = zero_code;
    tile.x_num_groups = x.num_groups;
    if (is_grouped(kind)) tile.group_steps = part.group / step_inputs(kind);
    if (is_integer(kind)) {
        for (int64_t r = 0; r < rows; ++r)
            for (int v = 0; v < 4; ++v) {
                i32x16 first = broadcast(-zero_code * x.groups[r].sum);
                memcpy(sums + 64 * r + 16 * v, &first, 64);
            }
    } else {
        memset(sums, 0, rows * PANEL * 4);
    }

    int64_t block_steps = smaller(steps, x.block / step_inputs(kind));
    if (is_grouped(kind)) {  // a block's scales are widened at once
        const int64_t most = num_tiles == 1 ? SCALES_STEPS : MAX_BLOCK_STEPS;
        block_steps = smaller(block_steps, most / tile.group_steps * tile.group_steps);
        if (block_steps == 0) block_steps = tile.group_steps;
    }
    for (int64_t first = 0; first < steps; first += block_steps) {
        const int64_t count = steps - first < block_steps ? steps - first : block_steps;
        if (is_grouped(kind)) {
            const int64_t first_group = first / tile.group_steps, num_groups = count / tile.group_steps;
            const int64_t at = (panel * x.num_groups + first_group) * PANEL;
            widen_scales(part.scale, part.scale_type, at, num_groups * PANEL, scales);
            float* offsets = part.offset ? scales + num_groups * PANEL : nullptr;
            if (part.offset) widen_scales(part.offset, part.scale_type, at, num_groups * PANEL, offsets);
            tile.scale = scales;
            tile.offset = offsets;
            tile.x_groups = x.groups + first_group;
        }
        tile.weight = weight + first * STEP_BYTES;
        tile.x = x.at(0, first * step_inputs(kind));
        tile.x_stride = x.stride_at(first * step_inputs(kind));
        tile.sums = sums;
        tile.num_steps = count;
        if (num_tiles == 1) {
            tile.prefetches = AHEAD;
            tiles[rows - 1](tile);
            continue;
        }
        const uint8_t* ahead = first + count < steps ? tile.weight + count * STEP_BYTES : next;
        const int64_t lines = (count * STEP_BYTES / 64 + num_tiles - 1) / num_tiles;  // per pass
        tile.prefetches = (4 * lines + count - 1) / count;
        int64_t row = 0;
        for (int64_t t = 0; t < num_tiles; ++t) {
            const int64_t tile_rows = (rows - row + num_tiles - t - 1) / (num_tiles - t);
            tile.prefetch = ahead + t * lines * 64;
            tiles[tile_rows - 1](tile);
            row += tile_rows;
            tile.x += tile_rows * tile.x_stride;
            tile.sums += tile_rows * PANEL;
            tile.x_groups += tile_rows * x.num_groups;
        }
    }
    if (is_integer(kind)) {
        for (int64_t r = 0; r < rows; ++r)
            for (int v = 0; v < 4; ++v) {
                const int64_t lane = panel * PANEL + 16 * v;
                float* p = sums + 64 * r + 16 * v;
                i32x16 total;
                memcpy(&total, p, 64);
                f32x16 y = to_f32(total) * (load_scales(part.scale, part.scale_type, lane) * x.groups[r].scale);
                if (part.offset)
                    y = fma(load_scales(part.offset, part.scale_type, lane), broadcast(x.groups[r].weight), y);
                store(p, y);
            }
    }
}

// ---- after the sums

INLINE f32x16 activate(f32x16 x, int32_t activation) {
    switch (activation) {
        case SILU: return x / (exp(-x) + 1.0f);
        case GELU_TANH: {
            // 0.5 x (1 + tanh(u)) = x / (1 + e^-2u)
            f32x16 u = 0.7978845608028654f * fma(x * x * x, broadcast(0.044715f), x);
            return x / (exp(-2.0f * u) + 1.0f);
        }
        case GELU: {
            // erfc by Abramowitz and Stegun 7.1.26, which errs by less than 1.5e-7; x Phi(x) from the small side.
            f32x16 z = abs(x) * 0.70710678118654752f;
            f32x16 t = 1.0f / fma(z, broadcast(0.3275911f), broadcast(1.0f));
            f32x16 p = broadcast(1.061405429f);
            p = fma(p, t, broadcast(-1.453152027f));
            p = fma(p, t, broadcast(1.421413741f));
            p = fma(p, t, broadcast(-0.284496736f));
            p = fma(p, t, broadcast(0.254829592f));
            f32x16 tail = 0.5f * (p * t) * exp(-(z * z));
            return x * select(x < 0.0f, tail, 1.0f - tail);
        }
        default: return x;
    }
}

template <class T>
void finish(const Job& job, int64_t row, int64_t rows, int64_t column, int64_t width, const float* sums,
            const float* bias, const float* ups, const float* up_bias) {
    for (int64_t r = 0; r < rows; ++r) {
        T* out = reinterpret_cast<T*>(job.out + (row + r) * job.out_stride) + column;
        const T* residual = nullptr;
        if (job.residual) residual = reinterpret_cast<const T*>(job.residual + (row + r) * job.residual_stride) + column;
        for (int64_t i = 0; i < width; i += 16) {
            const int n = width - i < 16 ? (int)(width - i) : 16;
            f32x16 y = load(sums + PANEL * r + i);
            if (bias) y += n < 16 ? load(bias + i, n) : load(bias + i);
            if (job.activation != NO_ACTIVATION) y = activate(y, job.activation);
            if (ups) {
                f32x16 up = load(ups + PANEL * r + i);
                if (up_bias) up += n < 16 ? load(up_bias + i, n) : load(up_bias + i);
                y *= up;
            }
            if (residual) y += n < 16 ? load(residual + i, n) : load(residual + i);
            if (n < 16)
                store(out + i, y, n);
            else
                store(out + i, y);
        }
    }
}

void finish(const Job& job, int64_t row, int64_t rows, int64_t column, int64_t width, const float* sums,
            const float* bias, const float* ups, const float* up_bias) {
    switch (job.out_type) {
        case TYPE_F32: return finish<float>(job, row, rows, column, width, sums, bias, ups, up_bias);
        case TYPE_BF16: return finish<bf16>(job, row, rows, column, width, sums, bias, ups, up_bias);
        default: return finish<f16>(job, row, rows, column, width, sums, bias, ups, up_bias);
    }
}

// ---- who computes which panel

// Every thread starts with a run of neighbours, so that memory is read in sequence; who is done takes from the others'
// ends.
class Shares {
  public:
    static constexpr int MAX_THREADS = 256;

    void deal(int64_t count, int threads) {
        threads_ = threads;
        for (int t = 0; t < threads; ++t)
            ranges_[t].value.store(pack(count * t / threads, count * (t + 1) / threads), std::memory_order_relaxed);
    }
    // The next panel of the thread, or -1.
    int64_t take(int thread) {
        int64_t got = pop(thread, true);
        for (int i = 1; got < 0 && i < threads_; ++i) got = pop((thread + i) % threads_, false);
        return got;
    }

  private:
    struct alignas(64) Range {
        std::atomic<uint64_t> value;
    };
    static uint64_t pack(uint64_t first, uint64_t stop) { return first << 32 | stop; }

    int64_t pop(int owner, bool front) {
        uint64_t old = ranges_[owner].value.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t first = old >> 32, stop = old & 0xffffffff;
            if (first >= stop) return -1;
            const uint64_t fresh = front ? pack(first + 1, stop) : pack(first, stop - 1);
            if (ranges_[owner].value.compare_exchange_weak(old, fresh, std::memory_order_relaxed))
                return front ? first : stop - 1;
        }
    }

    int threads_ = 0;
    Range ranges_[MAX_THREADS];
};

thread_local Shares own_shares;

struct Place {  // a job's panel
    const Part* part;
    int64_t panel;
    int64_t column;
};

Place place_of(const Linear& linear, int64_t job) {
    int64_t column = 0;
    const Part* part = linear.parts;
    while (job >= num_panels(part->num_rows)) {
        job -= num_panels(part->num_rows);
        column += part->num_rows;
        ++part;
    }
    return {part, job, column + job * PANEL};
}

const uint8_t* address_of(const Linear& linear, const Part& part, int64_t panel) {
    return part.weight + panel * num_steps((Kind)part.kind, linear.num_inputs) * STEP_BYTES;
}

void take_panels(const Job& job, int64_t row, int64_t rows, const Prepared* prepared, Shares& shares, int thread,
                 int64_t num_jobs, float* sums, float* scales) {
    const Linear& linear = *job.linear;
    for (int64_t at; (at = shares.take(thread)) >= 0;) {
        const Place here = place_of(linear, at);
        const Place after = place_of(linear, at + 1 < num_jobs ? at + 1 : at);
        const uint8_t* next = address_of(linear, *after.part, after.panel);
        const Part& part = *here.part;
        const int64_t left = part.num_rows - here.panel * PANEL, width = left < PANEL ? left : PANEL;
        const float* bias = linear.bias ? linear.bias + here.column : nullptr;
        if (!job.gated) {
            multiply(linear, part, prepared[part.preparation], here.panel, rows, sums, scales, next);
            finish(job, row, rows, here.column, width, sums, bias, nullptr, nullptr);
            continue;
        }
        const Part& up = linear.parts[1];
        float* ups = sums + rows * PANEL;
        multiply(linear, part, prepared[part.preparation], here.panel, rows, sums, scales,
                 address_of(linear, up, here.panel));
        multiply(linear, up, prepared[up.preparation], here.panel, rows, ups, scales, next);
        finish(job, row, rows, here.column, width, sums, bias, ups, bias ? bias + part.num_rows : nullptr);
    }
}

// Up to MAX_ROWS rows from `row` on.
void run_rows(const Job& job, int64_t row, int64_t rows) {
    const Linear& linear = *job.linear;
    const int64_t n = linear.num_inputs, whole = round_up(n, 16);
    int64_t num_jobs = 0;
    for (int i = 0; i < (job.gated ? 1 : linear.num_parts); ++i) num_jobs += num_panels(linear.parts[i].num_rows);
    int64_t x_bytes = 0;
    for (int p = 0; p < linear.num_preparations; ++p) x_bytes += prepared_bytes(linear.preparations[p], n, rows);
    // A block has at most 64 groups: 16 inputs are two steps of U4.
    const int64_t buffer_bytes = 8 * whole, sums_bytes = rows * PANEL * 4 * (job.gated ? 2 : 1);
    const int64_t scales_bytes = 2 * MAX_BLOCK_STEPS / 2 * PANEL * 4;
    const int64_t own_bytes = buffer_bytes + sums_bytes + scales_bytes;

    int threads = omp_get_max_threads();
    if (threads > Shares::MAX_THREADS) threads = Shares::MAX_THREADS;
    const double alone_s =
        linear.num_bytes / THREAD_BYTES_PER_S + linear.num_bytes / 64.0 * rows / THREAD_VECTORS_PER_S;
    if (threads > 1 && alone_s < REGION_S) threads = 1;
    // A single row is prepared by every thread for itself: cheaper than waiting for each other.
    const bool apart = rows == 1 || threads == 1;
    uint8_t* shared = apart ? nullptr : shared_scratch.get(x_bytes);
    Shares& shares = own_shares;
    shares.deal(num_jobs, threads);

    auto work = [&](int thread, int team) {
        uint8_t* own = own_scratch.get(own_bytes + (apart ? x_bytes : 0));
        float* buffer = reinterpret_cast<float*>(own);
        float* sums = reinterpret_cast<float*>(own + buffer_bytes);
        float* scales = reinterpret_cast<float*>(own + buffer_bytes + sums_bytes);
        uint8_t* memory = apart ? own + own_bytes : shared;
        Prepared prepared[8];
        for (int p = 0; p < linear.num_preparations; ++p) {
            prepared[p] = place(linear.preparations[p], n, rows, memory);
            memory += prepared_bytes(linear.preparations[p], n, rows);
        }
        if (apart) {
            for (int64_t r = 0; r < rows; ++r) prepare_row(job, row + r, r, prepared, buffer);
        } else {
            for (int64_t r = rows * thread / team; r < rows * (thread + 1) / team; ++r)
                prepare_row(job, row + r, r, prepared, buffer);
#pragma omp barrier
        }
        take_panels(job, row, rows, prepared, shares, thread, num_jobs, sums, scales);
    };
    if (threads == 1) {
        work(0, 1);
        return;
    }
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace

// y = f(x W^T + bias) + residual: f is the activation of all outputs, or of the first part's times the second part.
extern "C" void tllm_linear(const Linear* linear, const Norm* norm, const void* x, int64_t x_stride, int32_t x_type,
                            int64_t num_rows, void* out, int64_t out_stride, int32_t out_type, const void* residual,
                            int64_t residual_stride, int32_t activation, int32_t gated) {
    Job job;
    job.linear = linear;
    job.norm = norm;
    job.x = {static_cast<const uint8_t*>(x), x_stride, x_type};
    job.out = static_cast<uint8_t*>(out);
    job.out_stride = out_stride;
    job.out_type = out_type;
    job.residual = static_cast<const uint8_t*>(residual);
    job.residual_stride = residual_stride;
    job.activation = activation;
    job.gated = gated;
    for (int64_t row = 0; row < num_rows; row += MAX_ROWS)
        run_rows(job, row, num_rows - row < MAX_ROWS ? num_rows - row : MAX_ROWS);
}
