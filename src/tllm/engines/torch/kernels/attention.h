// The products of attention for a few queries and up to 512 keys, in an order that depends on neither.
//
// Keys are turned so that a lane is a key: a score is then one accumulator over head_dim, and no sum crosses lanes. Values
// are taken as they lie: a lane is an element of the head, and an output is one accumulator over positions.
// This file does not know chunks, blocks or threads.
#pragma once

#include "vec.h"

namespace attention {

constexpr int LANES = 16;
constexpr int TILE = 4;                          // vectors of keys turned at a time: they stay in the first cache
constexpr int SEGMENT = 512;                     // positions whose softmax is one; counted from position 0
constexpr int VECTORS = SEGMENT / LANES;         // of keys in a segment

#if defined(__AVX512F__)
constexpr int QUERIES = 4;  // that share what is loaded, as far as there are registers
constexpr int WIDTH = 4;    // vectors that share a query
#else
constexpr int QUERIES = 2;
constexpr int WIDTH = 2;
#endif

// How a type is computed in. Keys and queries are held in words of 32 bits: pairs of bf16, else single numbers in fp32.
// Values become vectors of fp32, from one load as many as `vectors`: of bf16 that is the evens and the odds of 32 elements,
// and outputs stay in that order until they are rounded again.
template <class T> struct Form {
    static constexpr int word = 1;     // elements of a word
    static constexpr int vectors = 1;  // of values

    INLINE u32x16 words(const T* x) { return (u32x16)load(x); }
    INLINE u32x16 words(const T* x, int left) { return (u32x16)load(x, left); }
    INLINE f32x16 dot(f32x16 acc, const uint32_t* keys, const uint32_t* query) {
        float q;
        memcpy(&q, query, 4);
        return fma(broadcast(q), load(reinterpret_cast<const float*>(keys)), acc);
    }
    INLINE void widen(u32x16 words, f32x16* values) { values[0] = (f32x16)words; }
    INLINE void narrow(const float* values, T* x) { store(x, load(values)); }
    INLINE void narrow(const float* values, T* x, int left) { store(x, load(values), left); }
};
template <> struct Form<bf16> {
    static constexpr int word = 2;
    static constexpr int vectors = 2;

    INLINE u32x16 words(const bf16* x) {
        u32x16 words;
        memcpy(&words, x, 64);
        return words;
    }
    INLINE u32x16 words(const bf16* x, int left) {
        if (left % 2 == 0) return (u32x16)load(reinterpret_cast<const float*>(x), left / 2);
        u32x16 words = {};
        memcpy(&words, x, left * sizeof(bf16));
        return words;
    }
    INLINE f32x16 dot(f32x16 acc, const uint32_t* keys, const uint32_t* query) {
        return dot_bf16(acc, load_pairs(reinterpret_cast<const bf16*>(keys)), broadcast_pair(reinterpret_cast<const bf16*>(query)));
    }
    INLINE void widen(u32x16 words, f32x16* values) {
        values[0] = (f32x16)(words << 16);
        values[1] = (f32x16)(words & 0xffff0000);
    }
    INLINE u32x16 rounded(f32x16 x) {  // in the upper halves
        u32x16 u = (u32x16)x;
        u32x16 nan = (u32x16)((i32x16)(x != x));
        return ((u + 0x7fff + ((u >> 16) & 1)) & ~nan) | ((u | 0x400000) & nan);
    }
    INLINE u32x16 narrow(const float* values) {
        return (rounded(load(values)) >> 16) | (rounded(load(values + LANES)) & 0xffff0000);
    }
    INLINE void narrow(const float* values, bf16* x) {
        u32x16 words = narrow(values);
        memcpy(x, &words, 64);
    }
    INLINE void narrow(const float* values, bf16* x, int left) {
        u32x16 words = narrow(values);
        memcpy(x, &words, left * sizeof(bf16));
    }
};
template <class T> constexpr int ELEMENTS = LANES * Form<T>::word;  // of a vector of words

// A run of successive slots.
struct Run {
    int position;  // in the segment
    int count;
    int64_t slot;
};

// What is fetched while values are weighed: the keys that are needed next, in runs that likely are like those of the values.
template <class T> struct Next {
    const T* keys;
    const Run* runs;
    int num_runs;
};

// To the second cache: a segment's keys and values are more than the first one holds.
INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- turning keys

typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));

// Column i of 16 rows becomes row i, in the rows' memory. `row(i)` loads a row.
template <class Row> INLINE void turn(Row row, uint32_t* turned, int num_words) {
    u32x16 r[16];
#if defined(__AVX512F__)
    u64x8 t[16];
    for (int i = 0; i < 16; i += 4) {  // 4 x 4 within each quarter of a register
        u32x16 a = row(i), b = row(i + 1), c = row(i + 2), d = row(i + 3);
        constexpr u32x16 low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
        constexpr u32x16 high = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
        u64x8 ab0 = (u64x8)__builtin_shuffle(a, b, low), ab2 = (u64x8)__builtin_shuffle(a, b, high);
        u64x8 cd0 = (u64x8)__builtin_shuffle(c, d, low), cd2 = (u64x8)__builtin_shuffle(c, d, high);
        t[i] = __builtin_shuffle(ab0, cd0, u64x8{0, 8, 2, 10, 4, 12, 6, 14});
        t[i + 1] = __builtin_shuffle(ab0, cd0, u64x8{1, 9, 3, 11, 5, 13, 7, 15});
        t[i + 2] = __builtin_shuffle(ab2, cd2, u64x8{0, 8, 2, 10, 4, 12, 6, 14});
        t[i + 3] = __builtin_shuffle(ab2, cd2, u64x8{1, 9, 3, 11, 5, 13, 7, 15});
        asm volatile("" ::: "memory");  // loads stay where they are: there are just enough registers
    }
    for (int i = 0; i < 4; ++i) {  // 4 x 4 of quarters
        u64x8 ab0 = __builtin_shuffle(t[i], t[i + 4], u64x8{0, 1, 4, 5, 8, 9, 12, 13});
        u64x8 ab1 = __builtin_shuffle(t[i], t[i + 4], u64x8{2, 3, 6, 7, 10, 11, 14, 15});
        u64x8 cd0 = __builtin_shuffle(t[i + 8], t[i + 12], u64x8{0, 1, 4, 5, 8, 9, 12, 13});
        u64x8 cd1 = __builtin_shuffle(t[i + 8], t[i + 12], u64x8{2, 3, 6, 7, 10, 11, 14, 15});
        r[i] = (u32x16)__builtin_shuffle(ab0, cd0, u64x8{0, 1, 4, 5, 8, 9, 12, 13});
        r[i + 4] = (u32x16)__builtin_shuffle(ab1, cd1, u64x8{0, 1, 4, 5, 8, 9, 12, 13});
        r[i + 8] = (u32x16)__builtin_shuffle(ab0, cd0, u64x8{2, 3, 6, 7, 10, 11, 14, 15});
        r[i + 12] = (u32x16)__builtin_shuffle(ab1, cd1, u64x8{2, 3, 6, 7, 10, 11, 14, 15});
    }
#else
    for (int i = 0; i < 4; ++i) {
        u32x16 w = row(4 * i), x = row(4 * i + 1), y = row(4 * i + 2), z = row(4 * i + 3);
        for (int j = 0; j < 4; ++j) {
            u32x4 a = part_of<u32x16, u32x4>(w, j), b = part_of<u32x16, u32x4>(x, j);
            u32x4 c = part_of<u32x16, u32x4>(y, j), d = part_of<u32x16, u32x4>(z, j);
            u32x4 ab0 = __builtin_shuffle(a, b, u32x4{0, 4, 1, 5}), ab2 = __builtin_shuffle(a, b, u32x4{2, 6, 3, 7});
            u32x4 cd0 = __builtin_shuffle(c, d, u32x4{0, 4, 1, 5}), cd2 = __builtin_shuffle(c, d, u32x4{2, 6, 3, 7});
            set_part(r[4 * j], i, __builtin_shuffle(ab0, cd0, u32x4{0, 1, 4, 5}));
            set_part(r[4 * j + 1], i, __builtin_shuffle(ab0, cd0, u32x4{2, 3, 6, 7}));
            set_part(r[4 * j + 2], i, __builtin_shuffle(ab2, cd2, u32x4{0, 1, 4, 5}));
            set_part(r[4 * j + 3], i, __builtin_shuffle(ab2, cd2, u32x4{2, 3, 6, 7}));
        }
    }
#endif
    if (num_words >= LANES)
        for (int i = 0; i < 16; ++i) memcpy(turned + i * LANES, &r[i], 64);
    else
        for (int i = 0; i < num_words; ++i) memcpy(turned + i * LANES, &r[i], 64);
}

// 16 keys, `row(i)` being where key i starts, to [words][16].
template <class T, class Row> INLINE void turn_keys(Row row, int head_dim, uint32_t* turned) {
    int first = 0;
    for (; first + ELEMENTS<T> <= head_dim; first += ELEMENTS<T>) {
        turn([&](int i) { return Form<T>::words(row(i) + first); }, turned, LANES);
        turned += LANES * LANES;
    }
    if (first < head_dim) {
        int left = head_dim - first;
        turn([&](int i) { return Form<T>::words(row(i) + first, left); }, turned, (left + Form<T>::word - 1) / Form<T>::word);
    }
}

// ---- scores

// scores[query][vector][16], a query's scores SEGMENT apart.
template <class T, int NQ, int NV>
INLINE void score(const uint32_t* turned, const uint32_t* queries, int num_words, float scale, float* scores) {
    f32x16 acc[NQ][NV] = {};
    for (int w = 0; w < num_words; ++w)
        for (int q = 0; q < NQ; ++q)
            for (int v = 0; v < NV; ++v)
                acc[q][v] = Form<T>::dot(acc[q][v], turned + (v * num_words + w) * LANES, queries + q * num_words + w);
    for (int q = 0; q < NQ; ++q)
        for (int v = 0; v < NV; ++v) store(scores + q * SEGMENT + v * LANES, acc[q][v] * scale);
}

template <class T, int NQ>
void score_vectors(const uint32_t* turned, int num_vectors, const uint32_t* queries, int num_words, float scale, float* scores) {
    int v = 0;
    for (; v + WIDTH <= num_vectors; v += WIDTH)
        score<T, NQ, WIDTH>(turned + v * num_words * LANES, queries, num_words, scale, scores + v * LANES);
    for (; v < num_vectors; ++v)
        score<T, NQ, 1>(turned + v * num_words * LANES, queries, num_words, scale, scores + v * LANES);
}

template <class T>
void score_all(const uint32_t* turned, int num_vectors, const uint32_t* queries, int num_queries, int num_words, float scale, float* scores) {
    int q = 0;
    for (; q + QUERIES <= num_queries; q += QUERIES)
        score_vectors<T, QUERIES>(turned, num_vectors, queries + q * num_words, num_words, scale, scores + q * SEGMENT);
    const uint32_t* rest = queries + q * num_words;
    switch (num_queries - q) {
#if defined(__AVX512F__)
        case 3: return score_vectors<T, 3>(turned, num_vectors, rest, num_words, scale, scores + q * SEGMENT);
        case 2: return score_vectors<T, 2>(turned, num_vectors, rest, num_words, scale, scores + q * SEGMENT);
#endif
        case 1: return score_vectors<T, 1>(turned, num_vectors, rest, num_words, scale, scores + q * SEGMENT);
        default: return;
    }
}

// ---- softmax

// e^x for x <= 0 within 2 ulp; 0 below -87.7; NaN of NaN.
INLINE f32x16 exp_negative(f32x16 x) {
    constexpr float shift = 12582912.0f + 127;  // 1.5 * 2^23: a sum's lowest bits are its whole part; 127: the exponent's bias
    f32x16 bounded = max(broadcast(-88.0f), x);    // in this order a NaN stays
    f32x16 shifted = fma(bounded, broadcast(1.44269504088896341f), broadcast(shift));
    f32x16 n = shifted - shift;
    f32x16 r = fma(n, broadcast(-0.693359375f), bounded);
    r = fma(n, broadcast(2.12194440e-4f), r);
    f32x16 p = broadcast(1.9875691500e-4f);  // Cephes' expf
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    return p * (f32x16)((u32x16)shifted << 23);  // n = -127 is the factor 0
}
INLINE float exp_negative(float x) { return exp_negative(broadcast(x))[0]; }

// Scores of positions [first, stop) to weights, the greatest of which is 1; zeros elsewhere in vectors [v0, v1).
// The answer does not depend on v0 and v1: what is added for other positions is zero.
INLINE void softmax(float* scores, int first, int stop, int v0, int v1, float* greatest, float* total) {
    i32x16 lanes = lane_numbers();
    f32x16 most = broadcast(-__builtin_inff());
    for (int v = v0; v < v1; ++v) {
        f32x16 s = load(scores + v * LANES);
        if (v * LANES < first || (v + 1) * LANES > stop) {
            i32x16 position = lanes + v * LANES;
            s = select((position >= first) & (position < stop), s, broadcast(-__builtin_inff()));
            store(scores + v * LANES, s);
        }
        most = max(most, s);
    }
    float m = largest(most);
    f32x16 sums = zero();
    for (int v = v0; v < v1; ++v) {
        f32x16 s = load(scores + v * LANES);
        f32x16 p = exp_negative(s - m);
        sums = sums + p;
        store(scores + v * LANES, p);
    }
    *greatest = m;
    *total = sum(sums);
}

// ---- outputs

// outputs[query][vector] += weight * value over the runs, for as many loads of a row as `NL`.
// `left`: elements of the only load if it is not whole.
template <class T, int NQ, int NL, bool WHOLE>
INLINE void weigh(const float* weights, const Run* runs, int num_runs, const T* values, int64_t stride, int left, float* outputs, int output_stride, Next<T> next) {
    constexpr int NV = NL * Form<T>::vectors;
    f32x16 acc[NQ][NV];
    for (int q = 0; q < NQ; ++q)
        for (int v = 0; v < NV; ++v) acc[q][v] = load(outputs + q * output_stride + v * LANES);
    for (int r = 0; r < num_runs; ++r) {
        const T* row = values + runs[r].slot * stride;
        const float* weight = weights + runs[r].position;
        bool known = r < next.num_runs;
        const T* ahead = known ? next.keys + next.runs[r].slot * stride : row;
        int64_t step = known ? stride : 0;
        for (int i = 0; i < runs[r].count; ++i) {
            for (int l = 0; l < NL; ++l) {
                fetch(ahead + l * ELEMENTS<T>);
                f32x16 x[Form<T>::vectors];
                Form<T>::widen(WHOLE ? Form<T>::words(row + l * ELEMENTS<T>) : Form<T>::words(row, left), x);
#if defined(__AVX512F__)
                for (int v = 0; v < Form<T>::vectors; ++v) asm("" : "+v"(x[v]));  // once, not again for every query
#endif
                for (int q = 0; q < NQ; ++q)
                    for (int v = 0; v < Form<T>::vectors; ++v)
                        acc[q][l * Form<T>::vectors + v] = fma(broadcast(weight[q * SEGMENT + i]), x[v], acc[q][l * Form<T>::vectors + v]);
            }
            row += stride;
            ahead += step;
        }
    }
    for (int q = 0; q < NQ; ++q)
        for (int v = 0; v < NV; ++v) store(outputs + q * output_stride + v * LANES, acc[q][v]);
}

template <class T, int NQ>
void weigh_row(const float* weights, const Run* runs, int num_runs, const T* values, int64_t stride, int head_dim, float* outputs, int output_stride, Next<T> next) {
    constexpr int loads = WIDTH / Form<T>::vectors;
    int d = 0;
    for (; d + loads * ELEMENTS<T> <= head_dim; d += loads * ELEMENTS<T>)
        weigh<T, NQ, loads, true>(weights, runs, num_runs, values + d, stride, 0, outputs + d, output_stride, {next.keys + d, next.runs, next.num_runs});
    if (loads > 1)
        for (; d + ELEMENTS<T> <= head_dim; d += ELEMENTS<T>)
            weigh<T, NQ, 1, true>(weights, runs, num_runs, values + d, stride, 0, outputs + d, output_stride, {next.keys + d, next.runs, next.num_runs});
    if (d < head_dim)
        weigh<T, NQ, 1, false>(weights, runs, num_runs, values + d, stride, head_dim - d, outputs + d, output_stride, {next.keys + d, next.runs, next.num_runs});
}

// `output_stride` is head_dim in whole loads.
template <class T>
void weigh_all(const float* weights, int num_queries, const Run* runs, int num_runs, const T* values, int64_t stride, int head_dim, float* outputs, int output_stride, Next<T> next) {
    int q = 0;
    for (; q + QUERIES <= num_queries; q += QUERIES)
        weigh_row<T, QUERIES>(weights + q * SEGMENT, runs, num_runs, values, stride, head_dim, outputs + q * output_stride, output_stride, q ? Next<T>{} : next);
    weights += q * SEGMENT;
    outputs += q * output_stride;
    if (q) next = {};
    switch (num_queries - q) {
#if defined(__AVX512F__)
        case 3: return weigh_row<T, 3>(weights, runs, num_runs, values, stride, head_dim, outputs, output_stride, next);
        case 2: return weigh_row<T, 2>(weights, runs, num_runs, values, stride, head_dim, outputs, output_stride, next);
#endif
        case 1: return weigh_row<T, 1>(weights, runs, num_runs, values, stride, head_dim, outputs, output_stride, next);
        default: return;
    }
}

// A row in fp32 as `weigh` takes it, zeros behind its end.
template <class T> INLINE void widen_row(const T* row, int head_dim, float* widened) {
    int d = 0;
    f32x16 x[Form<T>::vectors];
    for (; d < head_dim; d += ELEMENTS<T>) {
        Form<T>::widen(d + ELEMENTS<T> <= head_dim ? Form<T>::words(row + d) : Form<T>::words(row + d, head_dim - d), x);
        for (int v = 0; v < Form<T>::vectors; ++v) store(widened + d + v * LANES, x[v]);
    }
}

// Outputs of a query rounded to the model's type.
template <class T> INLINE void narrow_row(const float* outputs, int head_dim, T* row) {
    int d = 0;
    for (; d + ELEMENTS<T> <= head_dim; d += ELEMENTS<T>) Form<T>::narrow(outputs + d, row + d);
    if (d < head_dim) Form<T>::narrow(outputs + d, row + d, head_dim - d);
}

}  // namespace attention
