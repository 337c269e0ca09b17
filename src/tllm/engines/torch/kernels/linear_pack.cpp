// Rows of a weight into panels and back, and quantizing them.
//
// 16 rows are 16 lanes: a transpose turns 16 words of each row (a word is one f32, two halves or four codes) into 16
// vectors of the panel. Codes pass as `fours`: [K / 4][16] words of four codes, which is U8's layout already.
#include <omp.h>

#include "linear.h"
#include "scratch.h"
#include "vec.h"

namespace {

constexpr int64_t READ_AHEAD = 512;  // bytes

thread_local Scratch pack_scratch;

int64_t type_bytes(int32_t type) { return type == TYPE_F32 ? 4 : 2; }

INLINE f32x16 load_as_f32(const uint8_t* p, int32_t type) {
    switch (type) {
        case TYPE_F32: return load(reinterpret_cast<const float*>(p));
        case TYPE_BF16: return load(reinterpret_cast<const bf16*>(p));
        default: return load(reinterpret_cast<const f16*>(p));
    }
}

struct Source {  // rows of floats in memory
    const uint8_t* data;
    int64_t stride;  // bytes
    int32_t type;
};

// 16 lanes of a part: rows `first` (a multiple of 16) and on, of which only some are being written.
struct Lanes {
    int64_t first;
    int64_t from, to;  // rows

    bool whole() const { return from <= first && first + 16 <= to; }
    bool has(int lane) const { return from <= first + lane && first + lane < to; }
    i32x16 mask() const {
        i32x16 row = lane_numbers() + (int32_t)0;
        return (row >= (int32_t)(from - first)) & (row < (int32_t)(to - first));
    }
};

INLINE void put(uint8_t* target, i32x16 value, const Lanes& lanes, i32x16 mask) {
    if (lanes.whole()) return store_line(target, value);
    i32x16 old;
    memcpy(&old, target, 64);
    value = (value & mask) | (old & ~mask);
    memcpy(target, &value, 64);
}

uint8_t* target_of(const Part& part, int64_t row, int64_t steps, int64_t vector_bytes) {
    uint8_t* weight = const_cast<uint8_t*>(part.weight);
    return weight + row / PANEL * steps * STEP_BYTES + row % PANEL / 16 * vector_bytes;
}

// Words of a row in the part's type: from `at` on, 16 of them, zeros behind the row's end.
INLINE i32x16 words(const uint8_t* row, int32_t type, int32_t wanted, int64_t at, int64_t num_inputs) {
    const int64_t per_word = wanted == TYPE_F32 ? 1 : 2, first = at * per_word, count = 16 * per_word;
    const int64_t left = num_inputs - first;
    uint8_t padded[128];
    const uint8_t* p = row + first * type_bytes(type);
    __builtin_prefetch(p + READ_AHEAD, 0, 2);  // 16 rows are more streams than a processor follows by itself
    if (left < count) {
        memset(padded, 0, sizeof padded);
        if (left > 0) memcpy(padded, p, left * type_bytes(type));
        p = padded;
    }
    i32x16 result;
    if (type == wanted) {
        memcpy(&result, p, 64);
    } else if (wanted == TYPE_F32) {
        result = (i32x16)load_as_f32(p, type);
    } else {
        for (int half = 0; half < 2; ++half) {
            f32x16 x = load_as_f32(p + 16 * half * type_bytes(type), type);
            u16x16 narrowed = wanted == TYPE_BF16 ? narrow(x, bf16{}) : narrow(x, f16{});
            memcpy(reinterpret_cast<uint8_t*>(&result) + 32 * half, &narrowed, 32);
        }
    }
    return result;
}

void pack_plain(const Part& part, const Lanes& lanes, const Source& source) {
    const Kind kind = (Kind)part.kind;
    const int32_t wanted = kind == F32 ? TYPE_F32 : kind == F16 ? TYPE_F16 : TYPE_BF16;
    const int64_t steps = num_steps(kind, part.num_inputs);
    uint8_t* target = target_of(part, lanes.first, steps, kind == F16 ? 32 : 64);
    const i32x16 mask = lanes.mask();
    for (int64_t s = 0; s < steps; s += 16) {
        i32x16 block[16] = {};
        for (int lane = 0; lane < 16; ++lane)
            if (lanes.has(lane)) {
                const uint8_t* row = source.data + (lanes.first + lane - lanes.from) * source.stride;
                block[lane] = words(row, source.type, wanted, s, part.num_inputs);
            }
        transpose(block);
        for (int i = 0; i < 16 && s + i < steps; ++i) {
            uint8_t* p = target + (s + i) * STEP_BYTES;
            if (kind != F16) {
                put(p, block[i], lanes, mask);
                continue;
            }
            for (int k = 0; k < 2; ++k) {  // the pairs' firsts, then their seconds
                u16x16 halves = low_halves((u32x16)block[i] >> (16 * k)), old;
                if (!lanes.whole()) {
                    memcpy(&old, p + 128 * k, 32);
                    u16x16 kept = low_halves((u32x16)mask);
                    halves = (halves & kept) | (old & ~kept);
                }
                memcpy(p + 128 * k, &halves, 32);
            }
        }
    }
}

// ---- codes

int64_t num_fours(int64_t num_inputs) { return (num_inputs + 7) / 8 * 2; }

void pack_fours(const Part& part, const Lanes& lanes, const i32x16* fours) {
    const Kind kind = (Kind)part.kind;
    const int64_t steps = num_steps(kind, part.num_inputs);
    uint8_t* target = target_of(part, lanes.first, steps, 64);
    const i32x16 mask = lanes.mask();
    for (int64_t s = 0; s < steps; ++s) {
        const bool bytes = step_inputs(kind) == 4;
        put(target + s * STEP_BYTES, bytes ? fours[s] : fours[2 * s] | (fours[2 * s + 1] << 4), lanes, mask);
    }
}

// Row-major codes (rows of num_inputs bytes) to fours and back.
void fours_of_codes(const uint8_t* codes, int64_t num_inputs, const Lanes& lanes, i32x16* fours) {
    for (int64_t w = 0; w < num_fours(num_inputs); w += 16) {
        i32x16 block[16] = {};
        for (int lane = 0; lane < 16; ++lane)
            if (lanes.has(lane)) {
                const int64_t left = num_inputs - 4 * w;
                const uint8_t* row = codes + (lanes.first + lane - lanes.from) * num_inputs;
                if (left > 0) memcpy(&block[lane], row + 4 * w, left < 64 ? left : 64);
            }
        transpose(block);
        for (int i = 0; i < 16 && w + i < num_fours(num_inputs); ++i) fours[w + i] = block[i];
    }
}

void codes_of_fours(const i32x16* fours, int64_t num_inputs, const Lanes& lanes, uint8_t* codes) {
    for (int64_t w = 0; w < num_fours(num_inputs); w += 16) {
        i32x16 block[16] = {};
        for (int i = 0; i < 16 && w + i < num_fours(num_inputs); ++i) block[i] = fours[w + i];
        transpose(block);
        const int64_t left = num_inputs - 4 * w;
        for (int lane = 0; lane < 16; ++lane)
            if (lanes.has(lane) && left > 0) {
                uint8_t* row = codes + (lanes.first + lane - lanes.from) * num_inputs;
                memcpy(row + 4 * w, &block[lane], left < 64 ? left : 64);
            }
    }
}

// ---- quantizing: lanes are rows

INLINE f32x16 round_scale(f32x16 x, int32_t type) {
    switch (type) {
        case TYPE_F32: return x;
        case TYPE_BF16: return widen(narrow(x, bf16{}), bf16{});
        default: return widen(narrow(x, f16{}), f16{});
    }
}

INLINE f32x16 bounded(f32x16 x, float low, float high) { return min(max(x, broadcast(low)), broadcast(high)); }
// 1 / x, and 0 of 0
INLINE f32x16 inverse(f32x16 x) { return select(x == 0.0f, zero(), 1.0f / x); }

// scale = the largest magnitude / 127
void quantize_symmetric(const f32x16* w, int64_t n, int32_t type, i32x16* codes, f32x16* scale) {
    f32x16 most = zero();
    for (int64_t k = 0; k < n; ++k) most = max(most, abs(w[k]));
    *scale = round_scale(most * (1.0f / 127.0f), type);
    const f32x16 per_scale = inverse(*scale);
    for (int64_t k = 0; k < n; ++k) codes[k] = round_to_int(bounded(w[k] * per_scale, -127.0f, 127.0f)) + 128;
}

struct Affine {
    f32x16 scale, offset;
};

// The least squares fit of scale and offset to codes rounded by `from`, and what it leaves (without the constant part).
INLINE Affine refit(const f32x16* w, int64_t n, Affine from, f32x16 mean, f32x16* left) {
    const f32x16 per_scale = inverse(from.scale), shift = -from.offset * per_scale;
    f32x16 q_sum = zero(), qq_sum = zero(), qw_sum = zero();
    for (int64_t k = 0; k < n; ++k) {
        f32x16 q = bounded(fma(w[k], per_scale, shift), 0.0f, 15.0f);
        q = (q + 12582912.0f) - 12582912.0f;
        q_sum += q;
        qq_sum = fma(q, q, qq_sum);
        qw_sum = fma(q, w[k] - mean, qw_sum);
    }
    const float count = (float)n;
    const f32x16 q_mean = q_sum / count;
    const f32x16 variance = qq_sum - q_sum * q_mean;
    Affine to;
    to.scale = select(variance <= 0.0f, from.scale, qw_sum / variance);
    to.offset = fma(-to.scale, q_mean, mean);
    // sum (w - s q - o)^2 = sum (w - mean)^2 - s^2 variance, for this s and o
    *left = select(variance <= 0.0f, zero(), -(qw_sum * (qw_sum / variance)));
    return to;
}

// Ranges from the whole one to narrower ones on either side, each fitted; the best is fitted once more.
void quantize_affine(const f32x16* w, int64_t n, int32_t type, i32x16* codes, f32x16* scale, f32x16* offset) {
    f32x16 low = w[0], high = w[0], total = zero();
    for (int64_t k = 0; k < n; ++k) {
        low = min(low, w[k]);
        high = max(high, w[k]);
        total += w[k];
    }
    const f32x16 mean = total / (float)n, range = high - low;
    Affine best = {range / 15.0f, low};
    f32x16 best_left = zero();
    static const float cuts[][2] = {{0, 0},       {.04f, .04f}, {.08f, .08f}, {.12f, .12f}, {0, .08f}, {.08f, 0},
                                    {.04f, .12f}, {.12f, .04f}, {0, .16f},    {.16f, 0}};
    for (const auto& cut : cuts) {
        Affine from;
        from.scale = range * ((1.0f - cut[0] - cut[1]) / 15.0f);
        from.offset = fma(range, broadcast(cut[0]), low);
        f32x16 left;
        Affine to = refit(w, n, from, mean, &left);
        i32x16 better = left < best_left;
        best.scale = select(better, to.scale, best.scale);
        best.offset = select(better, to.offset, best.offset);
        best_left = select(better, left, best_left);
    }
    f32x16 left;
    for (int i = 0; i < 2; ++i) best = refit(w, n, best, mean, &left);
    *scale = round_scale(best.scale, type);
    *offset = round_scale(best.offset, type);
    const f32x16 per_scale = inverse(*scale), shift = -*offset * per_scale;
    for (int64_t k = 0; k < n; ++k) codes[k] = round_to_int(bounded(fma(w[k], per_scale, shift), 0.0f, 15.0f));
}

int64_t quantize_bytes(int64_t num_inputs) { return 64 * (2 * (num_inputs + 16) + num_fours(num_inputs)); }

// Fills fours, and scale and offset [groups][16].
void quantize_lanes(const Source& source, const Lanes& lanes, int64_t num_inputs, int32_t bits, int64_t group,
                    int32_t type, uint8_t* memory, i32x16* fours, f32x16* scale, f32x16* offset) {
    f32x16* w = reinterpret_cast<f32x16*>(memory);
    i32x16* codes = reinterpret_cast<i32x16*>(memory + 64 * (num_inputs + 16));
    for (int64_t k = 0; k < num_inputs; k += 16) {
        i32x16 block[16] = {};
        for (int lane = 0; lane < 16; ++lane)
            if (lanes.has(lane)) {
                const uint8_t* row = source.data + (lanes.first + lane - lanes.from) * source.stride;
                block[lane] = words(row, source.type, TYPE_F32, k, num_inputs);
            }
        transpose(block);
        memcpy(w + k, block, sizeof block);
    }
    for (int64_t g = 0; g < num_inputs / group; ++g) {
        const int64_t first = g * group;
        if (bits == 8)
            quantize_symmetric(w + first, group, type, codes + first, scale + g);
        else
            quantize_affine(w + first, group, type, codes + first, scale + g, offset + g);
    }
    for (int64_t k = num_inputs; k < num_inputs + 16; ++k) codes[k] = i32x16{};
    for (int64_t f = 0; f < num_fours(num_inputs); ++f)
        fours[f] = codes[4 * f] | (codes[4 * f + 1] << 8) | (codes[4 * f + 2] << 16) | (codes[4 * f + 3] << 24);
}

// Scales of 16 lanes into [panel][group][64].
void put_scales(const Part& part, const void* target, const Lanes& lanes, const f32x16* values) {
    const int64_t groups = part.num_inputs / part.group;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = (lanes.first / PANEL * groups + g) * PANEL + lanes.first % PANEL;
        for (int lane = 0; lane < 16; ++lane) {
            if (!lanes.has(lane)) continue;
            void* p = static_cast<uint8_t*>(const_cast<void*>(target)) + (at + lane) * type_bytes(part.scale_type);
            switch (part.scale_type) {
                case TYPE_F32: from_float(values[g][lane], static_cast<float*>(p)); break;
                case TYPE_BF16: from_float(values[g][lane], static_cast<bf16*>(p)); break;
                default: from_float(values[g][lane], static_cast<f16*>(p)); break;
            }
        }
    }
}

float scale_at(const Part& part, const void* scales, int64_t row, int64_t group) {
    const int64_t groups = part.num_inputs / part.group;
    const int64_t at = (row / PANEL * groups + group) * PANEL + row % PANEL;
    switch (part.scale_type) {
        case TYPE_F32: return static_cast<const float*>(scales)[at];
        case TYPE_BF16: return to_float(static_cast<const bf16*>(scales)[at]);
        default: return to_float(static_cast<const f16*>(scales)[at]);
    }
}

// One row as f32.
void unpack_row(const Part& part, int64_t row, float* out) {
    const Kind kind = (Kind)part.kind;
    const int64_t steps = num_steps(kind, part.num_inputs);
    const uint8_t* p = target_of(part, row, steps, kind == F16 ? 32 : 64) + row % 16 * (kind == F16 ? 2 : 4);
    const int64_t n = part.num_inputs;
    if (kind <= BF16) {
        for (int64_t s = 0; s < steps; ++s, p += STEP_BYTES) {
            if (kind == F32) {
                memcpy(out + s, p, 4);
            } else if (kind == BF16) {
                bf16 pair[2];
                memcpy(pair, p, 4);
                out[2 * s] = to_float(pair[0]);
                if (2 * s + 1 < n) out[2 * s + 1] = to_float(pair[1]);
            } else {
                for (int k = 0; k < 2 && 2 * s + k < n; ++k) {
                    f16 value;
                    memcpy(&value, p + 128 * k, 2);
                    out[2 * s + k] = to_float(value);
                }
            }
        }
        return;
    }
    const bool bytes = step_inputs(kind) == 4;
    const int64_t group = part.group;
    float scale = 0, offset = 0;
    int64_t group_end = 0;
    for (int64_t s = 0; s < steps; ++s, p += STEP_BYTES)
        for (int64_t i = 0, k = s * step_inputs(kind); i < step_inputs(kind) && k < n; ++i, ++k) {
            if (k == group_end) {
                const int64_t g = k / group;
                scale = scale_at(part, part.scale, row, g);
                offset = part.offset ? scale_at(part, part.offset, row, g) : (bytes ? -128.0f : -8.0f) * scale;
                group_end += group;
            }
            const int code = bytes ? p[i] : i < 4 ? p[i] & 15 : p[i - 4] >> 4;
            out[k] = scale * code + offset;
        }
}

template <class T> void narrow_row(const float* row, int64_t n, T* out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, load(row + i));
    if (i < n) store(out + i, load(row + i, (int)(n - i)), (int)(n - i));
}

// Calls f(lanes) for the runs of 16 lanes that rows from..to touch, on all threads.
template <class F> void for_lanes(int64_t from, int64_t to, F f) {
    const int64_t first = from / 16, stop = (to + 15) / 16;
#pragma omp parallel for schedule(static) if (stop - first > 1)
    for (int64_t i = first; i < stop; ++i) {
        f(Lanes{16 * i, from, to});
        settle();
    }
}

}  // namespace

// Rows `first`.. of the part from rows of floats. A quantized part quantizes them.
extern "C" void tllm_fill(const Part* part, int64_t first, int64_t num_rows, const void* data, int64_t stride,
                          int32_t type) {
    const Source source = {static_cast<const uint8_t*>(data), stride, type};
    for_lanes(first, first + num_rows, [&](const Lanes& lanes) {
        if (part->kind <= BF16) return pack_plain(*part, lanes, source);
        const int64_t n = part->num_inputs, groups = n / part->group;
        uint8_t* memory = pack_scratch.get(quantize_bytes(n) + 128 * groups);
        i32x16* fours = reinterpret_cast<i32x16*>(memory + 128 * (n + 16));
        f32x16* scale = reinterpret_cast<f32x16*>(memory + quantize_bytes(n));
        const int32_t bits = step_inputs((Kind)part->kind) == 4 ? 8 : 4;
        quantize_lanes(source, lanes, n, bits, part->group, part->scale_type, memory, fours, scale, scale + groups);
        pack_fours(*part, lanes, fours);
        put_scales(*part, part->scale, lanes, scale);
        if (part->offset) put_scales(*part, part->offset, lanes, scale + groups);
    });
}

// Rows `first`.. of a quantized part from row-major codes (rows, K), scales and offsets (rows, groups) in f32.
extern "C" void tllm_fill_codes(const Part* part, int64_t first, int64_t num_rows, const uint8_t* codes,
                                const float* scales, const float* offsets) {
    for_lanes(first, first + num_rows, [&](const Lanes& lanes) {
        const int64_t n = part->num_inputs, groups = n / part->group;
        uint8_t* memory = pack_scratch.get(64 * (num_fours(n) + groups));
        i32x16* fours = reinterpret_cast<i32x16*>(memory);
        f32x16* values = reinterpret_cast<f32x16*>(memory + 64 * num_fours(n));
        fours_of_codes(codes, n, lanes, fours);
        pack_fours(*part, lanes, fours);
        for (int which = 0; which < (part->offset ? 2 : 1); ++which) {
            const float* source = which ? offsets : scales;
            for (int64_t g = 0; g < groups; ++g)
                for (int lane = 0; lane < 16; ++lane)
                    values[g][lane] = lanes.has(lane) ? source[(lanes.first + lane - lanes.from) * groups + g] : 0.0f;
            put_scales(*part, which ? part->offset : part->scale, lanes, values);
        }
    });
}

// What tllm_fill makes of the rows: codes (rows, K), scales and, for 4 bits, offsets (rows, groups).
extern "C" void tllm_quantize(const void* data, int64_t stride, int32_t type, int64_t num_rows, int64_t num_inputs,
                              int32_t bits, int64_t group, int32_t scale_type, uint8_t* codes, float* scales,
                              float* offsets) {
    const Source source = {static_cast<const uint8_t*>(data), stride, type};
    const int64_t n = num_inputs, groups = n / group;
    for_lanes(0, num_rows, [&](const Lanes& lanes) {
        uint8_t* memory = pack_scratch.get(quantize_bytes(n) + 128 * groups);
        i32x16* fours = reinterpret_cast<i32x16*>(memory + 128 * (n + 16));
        f32x16* scale = reinterpret_cast<f32x16*>(memory + quantize_bytes(n));
        quantize_lanes(source, lanes, n, bits, group, scale_type, memory, fours, scale, scale + groups);
        codes_of_fours(fours, n, lanes, codes);
        for (int lane = 0; lane < 16; ++lane) {
            if (!lanes.has(lane)) continue;
            for (int64_t g = 0; g < groups; ++g) {
                scales[(lanes.first + lane) * groups + g] = scale[g][lane];
                if (offsets) offsets[(lanes.first + lane) * groups + g] = scale[groups + g][lane];
            }
        }
    });
}

// Rows of these numbers, in f32 or rounded to a type.
extern "C" void tllm_rows(const Part* part, const int64_t* ids, int64_t num_ids, void* out, int64_t stride,
                          int32_t type) {
#pragma omp parallel for schedule(static) if (num_ids > 1)
    for (int64_t i = 0; i < num_ids; ++i) {
        uint8_t* target = static_cast<uint8_t*>(out) + i * stride;
        float* row = type == TYPE_F32 ? reinterpret_cast<float*>(target)
                                      : reinterpret_cast<float*>(pack_scratch.get(4 * part->num_inputs));
        unpack_row(*part, ids[i], row);
        if (type == TYPE_BF16) narrow_row(row, part->num_inputs, reinterpret_cast<bf16*>(target));
        if (type == TYPE_F16) narrow_row(row, part->num_inputs, reinterpret_cast<f16*>(target));
    }
}
