// Vectors of 16 lanes of 32 bits, for whatever processor this is compiled for: AVX-512, AVX2, NEON or none.
//
// One source, one order of arithmetic: nothing here is contracted behind the writer's back (-ffp-contract=off), a fused
// multiply-add is written fma(), and where the processor has none it is a product and a sum.
// Instructions of one processor are named in this file only.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));  // 16 pairs of bf16
typedef uint8_t u8x64 __attribute__((vector_size(64)));    // 16 fours of codes
typedef uint8_t u8x16 __attribute__((vector_size(16)));

// 16 bits of storage, never computed in.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// ---- halves and quarters, for processors with narrower registers

template <class Whole, class Part> INLINE Part part_of(const Whole& whole, int index) {
    Part part;
    memcpy(&part, reinterpret_cast<const char*>(&whole) + index * sizeof(Part), sizeof(Part));
    return part;
}
template <class Whole, class Part> INLINE void set_part(Whole& whole, int index, const Part& part) {
    memcpy(reinterpret_cast<char*>(&whole) + index * sizeof(Part), &part, sizeof(Part));
}

// ---- making, comparing, choosing

INLINE f32x16 broadcast(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE i32x16 broadcast(int32_t x) { return i32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE f32x16 zero() { return f32x16{}; }

INLINE f32x16 bits_to_f32(u32x16 x) { return (f32x16)x; }
INLINE u32x16 f32_to_bits(f32x16 x) { return (u32x16)x; }
INLINE i32x16 lane_numbers() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Lanes of `yes` where the mask (a comparison's result) is set, of `no` elsewhere.
INLINE f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) {
    return (f32x16)(((i32x16)yes & mask) | ((i32x16)no & ~mask));
}

// max and min: the second argument where either is NaN.
INLINE f32x16 max(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select(a > b, a, b);
#endif
}
INLINE f32x16 min(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return select(a < b, a, b);
#endif
}
INLINE f32x16 abs(f32x16 a) { return (f32x16)((i32x16)a & 0x7fffffff); }

// a * b + c
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    f32x16 r;
    for (int i = 0; i < 2; ++i)
        set_part(r, i, _mm256_fmadd_ps(part_of<f32x16, __m256>(a, i), part_of<f32x16, __m256>(b, i), part_of<f32x16, __m256>(c, i)));
    return r;
#elif defined(__aarch64__)
    f32x16 r;
    for (int i = 0; i < 4; ++i)
        set_part(r, i, vfmaq_f32(part_of<f32x16, float32x4_t>(c, i), part_of<f32x16, float32x4_t>(a, i), part_of<f32x16, float32x4_t>(b, i)));
    return r;
#else
    return a * b + c;
#endif
}

// ---- across lanes; the order is the same on every processor

INLINE float sum(f32x16 x) {
    float lanes[16];
    memcpy(lanes, &x, 64);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    return lanes[0];
}
INLINE int32_t sum(i32x16 x) {
    int32_t lanes[16], total = 0;
    memcpy(lanes, &x, 64);
    for (int i = 0; i < 16; ++i) total += lanes[i];
    return total;
}
INLINE float largest(f32x16 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float lanes[16];
    memcpy(lanes, &x, 64);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; ++i) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
    return lanes[0];
#endif
}

// ---- memory: f32, bf16 and f16, whole or only the first n of 16 lanes (the others are zero, and are not touched)

INLINE f32x16 widen(u16x16 x, bf16) { return (f32x16)(__builtin_convertvector(x, u32x16) << 16); }

// Round to nearest even; a NaN stays one.
INLINE u16x16 narrow(f32x16 x, bf16) {
    u32x16 u = (u32x16)x;
    u32x16 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u32x16 nan = (u32x16)((i32x16)(x != x));
    rounded = (rounded & ~nan) | (((u >> 16) | 0x40) & nan);
    return __builtin_convertvector(rounded, u16x16);
}

INLINE f32x16 widen(u16x16 h, f16) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    f32x16 r;
    for (int i = 0; i < 2; ++i) set_part(r, i, _mm256_cvtph_ps(part_of<u16x16, __m128i>(h, i)));
    return r;
#elif defined(__aarch64__)
    f32x16 r;
    for (int i = 0; i < 4; ++i) set_part(r, i, vcvt_f32_f16(part_of<u16x16, float16x4_t>(h, i)));
    return r;
#else
    u32x16 u = __builtin_convertvector(h, u32x16);
    // The exponent's bias by a product, which also makes a subnormal half normal; infinity and NaN by their bits.
    f32x16 magnitude = (f32x16)((u & 0x7fff) << 13) * 0x1p112f;
    u32x16 special = (u32x16)((i32x16)((u & 0x7c00) == 0x7c00)) & 0x7f800000;
    return (f32x16)((u32x16)magnitude | special | ((u & 0x8000) << 16));
#endif
}

INLINE u16x16 narrow(f32x16 x, f16) {
#if defined(__AVX512F__)
    return (u16x16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    u16x16 r;
    for (int i = 0; i < 2; ++i) set_part(r, i, _mm256_cvtps_ph(part_of<f32x16, __m256>(x, i), _MM_FROUND_TO_NEAREST_INT));
    return r;
#elif defined(__aarch64__)
    u16x16 r;
    for (int i = 0; i < 4; ++i) set_part(r, i, vcvt_f16_f32(part_of<f32x16, float32x4_t>(x, i)));
    return r;
#else
    u32x16 u = (u32x16)x, sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    // Below 2^-14 a sum with 2^-1 rounds at a half's smallest step; above, the bits dropped round to nearest even.
    u32x16 small = (u32x16)((f32x16)u + 0.5f) - 0x3f000000;
    u32x16 normal = (u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
    u32x16 is_small = (u32x16)((i32x16)(u < (113u << 23)));
    u32x16 is_large = (u32x16)((i32x16)(u >= 0x477ff000));
    u32x16 is_nan = (u32x16)((i32x16)(u > 0x7f800000));
    u32x16 half = (small & is_small) | (normal & ~is_small);
    half = (half & ~is_large) | (is_large & 0x7c00) | (is_nan & 0x200);
    return __builtin_convertvector(half | sign, u16x16);
#endif
}

INLINE f32x16 load(const float* p) {
    f32x16 x;
    memcpy(&x, p, 64);
    return x;
}
INLINE void store(float* p, f32x16 x) { memcpy(p, &x, 64); }

template <class T> INLINE f32x16 load(const T* p) {
    u16x16 x;
    memcpy(&x, p, 32);
    return widen(x, T{});
}
template <class T> INLINE void store(T* p, f32x16 x) {
    u16x16 half = narrow(x, T{});
    memcpy(p, &half, 32);
}

INLINE f32x16 load(const float* p, int n) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    f32x16 x = {};
    memcpy(&x, p, n * sizeof(float));
    return x;
#endif
}
INLINE void store(float* p, f32x16 x, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
#else
    memcpy(p, &x, n * sizeof(float));
#endif
}
template <class T> INLINE f32x16 load(const T* p, int n) {
    u16x16 x = {};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    x = (u16x16)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
    memcpy(&x, p, n * sizeof(T));
#endif
    return widen(x, T{});
}
template <class T> INLINE void store(T* p, f32x16 x, int n) {
    u16x16 half = narrow(x, T{});
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)half);
#else
    memcpy(p, &half, n * sizeof(T));
#endif
}

// One number.
INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
INLINE float to_float(f16 x) {
    u16x16 h = {};
    h[0] = x.bits;
    return widen(h, f16{})[0];
}
INLINE void from_float(float x, float* p) { *p = x; }
template <class T> INLINE void from_float(float x, T* p) { p->bits = narrow(broadcast(x), T{})[0]; }

// A whole cache line that will not be read soon: memory is written without being read first. `settle` before others read it.
INLINE void store_line(void* p, i32x16 x) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)x);
#else
    memcpy(p, &x, 64);
#endif
}
INLINE void settle() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// ---- to and from integers

INLINE i32x16 round_to_int(f32x16 x) {  // to nearest even; x within +-2^22
#if defined(__AVX512F__)
    return (i32x16)_mm512_cvtps_epi32((__m512)x);
#else
    return (i32x16)(x + 12582912.0f) - 0x4b400000;
#endif
}
INLINE f32x16 to_f32(i32x16 x) { return __builtin_convertvector(x, f32x16); }
// The low byte of every lane.
INLINE u8x16 low_bytes(i32x16 x) {
#if defined(__AVX512F__)
    return (u8x16)_mm512_cvtepi32_epi8((__m512i)x);
#else
    return __builtin_convertvector(x & 0xff, u8x16);
#endif
}
INLINE i32x16 from_bytes(u8x16 x) { return __builtin_convertvector(x, i32x16); }

// ---- dot products that add to an accumulator per lane

INLINE u16x32 load_pairs(const bf16* p) {
    u16x32 x;
    memcpy(&x, p, 64);
    return x;
}
INLINE u16x32 broadcast_pair(const bf16* p) {  // p[0], p[1] in every pair
    int32_t pair;
    memcpy(&pair, p, 4);
    return (u16x32)broadcast(pair);
}
// acc + a.first * b.first + a.second * b.second. How it rounds differs between processors, not between calls.
INLINE f32x16 dot_bf16(f32x16 acc, u16x32 a, u16x32 b) {
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc = fma((f32x16)((u32x16)a & 0xffff0000), (f32x16)((u32x16)b & 0xffff0000), acc);
    return fma((f32x16)((u32x16)a << 16), (f32x16)((u32x16)b << 16), acc);
#endif
}

INLINE u8x64 load_codes(const uint8_t* p) {
    u8x64 x;
    memcpy(&x, p, 64);
    return x;
}
INLINE i32x16 broadcast_four(const int8_t* p) {  // p[0..3] in every lane
    int32_t four;
    memcpy(&four, p, 4);
    return broadcast(four);
}
// acc + the four u8 of a lane times the four s8 of a lane, exactly.
INLINE i32x16 dot_u8s8(i32x16 acc, u8x64 codes, i32x16 fours) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)fours);
#elif defined(__AVXVNNI__)
    i32x16 r;
    for (int i = 0; i < 2; ++i)
        set_part(r, i, _mm256_dpbusd_avx_epi32(part_of<i32x16, __m256i>(acc, i), part_of<u8x64, __m256i>(codes, i), part_of<i32x16, __m256i>(fours, i)));
    return r;
#elif defined(__AVX2__)
    // Products of bytes summed in pairs of 16 bits would saturate: bytes are widened, evens and odds apart.
    i32x16 r;
    for (int i = 0; i < 2; ++i) {
        __m256i w = part_of<u8x64, __m256i>(codes, i), a = part_of<i32x16, __m256i>(fours, i);
        __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
        __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
        set_part(r, i, _mm256_add_epi32(part_of<i32x16, __m256i>(acc, i), _mm256_add_epi32(even, odd)));
    }
    return r;
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    i32x16 r;
    for (int i = 0; i < 4; ++i)
        set_part(r, i, vusdotq_s32(part_of<i32x16, int32x4_t>(acc, i), part_of<u8x64, uint8x16_t>(codes, i), part_of<i32x16, int8x16_t>(fours, i)));
    return r;
#elif defined(__ARM_FEATURE_DOTPROD)
    // codes - 128 fits s8; 128 = 64 + 64 times the activations is added again.
    i32x16 r;
    for (int i = 0; i < 4; ++i) {
        int8x16_t w = vreinterpretq_s8_u8(veorq_u8(part_of<u8x64, uint8x16_t>(codes, i), vdupq_n_u8(0x80)));
        int8x16_t a = part_of<i32x16, int8x16_t>(fours, i);
        int32x4_t s = vdotq_s32(part_of<i32x16, int32x4_t>(acc, i), w, a);
        s = vdotq_s32(s, vdupq_n_s8(64), a);
        set_part(r, i, vdotq_s32(s, vdupq_n_s8(64), a));
    }
    return r;
#else
    u32x16 w = (u32x16)codes;
    for (int i = 0; i < 4; ++i) acc += (i32x16)((w >> (8 * i)) & 0xff) * ((fours << (24 - 8 * i)) >> 24);
    return acc;
#endif
}
// The same for codes of at most 15.
INLINE i32x16 dot_u4s8(i32x16 acc, u8x64 codes, i32x16 fours) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
    i32x16 r;
    for (int i = 0; i < 2; ++i) {  // 2 * 15 * 127 fits 16 bits
        __m256i pairs = _mm256_maddubs_epi16(part_of<u8x64, __m256i>(codes, i), part_of<i32x16, __m256i>(fours, i));
        __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        set_part(r, i, _mm256_add_epi32(part_of<i32x16, __m256i>(acc, i), sums));
    }
    return r;
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
    i32x16 r;
    for (int i = 0; i < 4; ++i)
        set_part(r, i, vdotq_s32(part_of<i32x16, int32x4_t>(acc, i), part_of<u8x64, int8x16_t>(codes, i), part_of<i32x16, int8x16_t>(fours, i)));
    return r;
#else
    return dot_u8s8(acc, codes, fours);
#endif
}

// ---- 16 x 16 lanes of 32 bits: rows become columns

#if defined(__AVX512F__)
INLINE void transpose(i32x16 (&r)[16]) {
    i32x16 t[16];
    for (int i = 0; i < 16; i += 2) {  // pairs of neighbours: 1 x 1
        t[i] = (i32x16)_mm512_unpacklo_epi32((__m512i)r[i], (__m512i)r[i + 1]);
        t[i + 1] = (i32x16)_mm512_unpackhi_epi32((__m512i)r[i], (__m512i)r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // 2 x 2: r[i + j] holds column j of each quarter, rows i..i+3
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = (i32x16)_mm512_unpacklo_epi64((__m512i)t[i + j], (__m512i)t[i + j + 2]);
            r[i + 2 * j + 1] = (i32x16)_mm512_unpackhi_epi64((__m512i)t[i + j], (__m512i)t[i + j + 2]);
        }
    for (int j = 0; j < 4; ++j) {  // quarters
        __m512i a = (__m512i)r[j], b = (__m512i)r[j + 4], c = (__m512i)r[j + 8], d = (__m512i)r[j + 12];
        __m512i ab_even = _mm512_shuffle_i32x4(a, b, 0x88), ab_odd = _mm512_shuffle_i32x4(a, b, 0xdd);
        __m512i cd_even = _mm512_shuffle_i32x4(c, d, 0x88), cd_odd = _mm512_shuffle_i32x4(c, d, 0xdd);
        t[j] = (i32x16)_mm512_shuffle_i32x4(ab_even, cd_even, 0x88);
        t[j + 8] = (i32x16)_mm512_shuffle_i32x4(ab_even, cd_even, 0xdd);
        t[j + 4] = (i32x16)_mm512_shuffle_i32x4(ab_odd, cd_odd, 0x88);
        t[j + 12] = (i32x16)_mm512_shuffle_i32x4(ab_odd, cd_odd, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#else
typedef int32_t i32x4 __attribute__((vector_size(16)));
INLINE void transpose(i32x16 (&r)[16]) {
    i32x16 t[16];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            i32x4 a = part_of<i32x16, i32x4>(r[4 * i], j), b = part_of<i32x16, i32x4>(r[4 * i + 1], j);
            i32x4 c = part_of<i32x16, i32x4>(r[4 * i + 2], j), d = part_of<i32x16, i32x4>(r[4 * i + 3], j);
            i32x4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            i32x4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            set_part(t[4 * j], i, (i32x4)__builtin_shufflevector(ab, cd, 0, 1, 4, 5));
            set_part(t[4 * j + 1], i, (i32x4)__builtin_shufflevector(ab, cd, 2, 3, 6, 7));
            set_part(t[4 * j + 2], i, (i32x4)__builtin_shufflevector(ab2, cd2, 0, 1, 4, 5));
            set_part(t[4 * j + 3], i, (i32x4)__builtin_shufflevector(ab2, cd2, 2, 3, 6, 7));
        }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

// ---- functions

// e^x within 2 ulp; 0 below -87.3, infinity above 88.7, NaN of NaN.
INLINE f32x16 exp(f32x16 x) {
    f32x16 bounded = select(x < -88.0f, broadcast(-88.0f), select(x > 89.0f, broadcast(89.0f), x));
    f32x16 n = (bounded * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    f32x16 r = fma(n, broadcast(-0.693359375f), bounded);
    r = fma(n, broadcast(2.12194440e-4f), r);
    // e^r on [-ln 2 / 2, ln 2 / 2]: the polynomial of Cephes' expf.
    f32x16 p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    // 2^n in two factors: n = 128 does not fit one exponent.
    i32x16 whole = round_to_int(n);
    i32x16 half = whole >> 1;
    p *= (f32x16)((half + 127) << 23);
    p *= (f32x16)((whole - half + 127) << 23);
    p = select(x < -87.33654f, zero(), p);
    return select(x > 88.72283f, broadcast(__builtin_inff()), p);
}
