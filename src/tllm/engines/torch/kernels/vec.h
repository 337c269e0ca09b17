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
#define INLINE_MEMBER inline __attribute__((always_inline))

#if defined(__AVX512F__)

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));  // 16 pairs of bf16
typedef uint8_t u8x64 __attribute__((vector_size(64)));    // 16 fours of codes

#else

// Registers are narrower. A compiler that is given vectors of 64 bytes nonetheless keeps them in memory, so they are
// pairs of halves here: two registers of AVX2, or two pairs of two registers of 16 bytes.
template <class T, class H> struct Pair {
    H lo, hi;

    typedef T Lane __attribute__((may_alias));
    Lane& operator[](int i) { return reinterpret_cast<Lane*>(this)[i]; }
    Lane operator[](int i) const { return reinterpret_cast<const Lane*>(this)[i]; }
    // The same bits.
    template <class U, class G> INLINE_MEMBER explicit operator Pair<U, G>() const { return {(G)lo, (G)hi}; }
};
template <class T> struct Scalar {  // keeps an operand from being deduced from
    typedef T type;
};

#define LIFT(op)                                                                                               \
    template <class T, class H> INLINE Pair<T, H> operator op(const Pair<T, H>& a, const Pair<T, H>& b) {      \
        return {a.lo op b.lo, a.hi op b.hi};                                                                   \
    }                                                                                                          \
    template <class T, class H> INLINE Pair<T, H> operator op(const Pair<T, H>& a, typename Scalar<T>::type b) { \
        return {a.lo op b, a.hi op b};                                                                         \
    }                                                                                                          \
    template <class T, class H> INLINE Pair<T, H> operator op(typename Scalar<T>::type a, const Pair<T, H>& b) { \
        return {a op b.lo, a op b.hi};                                                                         \
    }                                                                                                          \
    template <class T, class H> INLINE Pair<T, H>& operator op##=(Pair<T, H>& a, const Pair<T, H>& b) {        \
        return a = a op b;                                                                                     \
    }                                                                                                          \
    template <class T, class H> INLINE Pair<T, H>& operator op##=(Pair<T, H>& a, typename Scalar<T>::type b) { \
        return a = a op b;                                                                                     \
    }
LIFT(+) LIFT(-) LIFT(*) LIFT(/) LIFT(&) LIFT(|) LIFT(^) LIFT(<<) LIFT(>>)
#undef LIFT
template <class M> INLINE Pair<int32_t, M> mask_of(const M& lo, const M& hi) { return {lo, hi}; }
#define LIFT(op)                                                                                       \
    template <class T, class H> INLINE auto operator op(const Pair<T, H>& a, const Pair<T, H>& b) {    \
        return mask_of(a.lo op b.lo, a.hi op b.hi);                                                    \
    }                                                                                                  \
    template <class T, class H> INLINE auto operator op(const Pair<T, H>& a, typename Scalar<T>::type b) { \
        return mask_of(a.lo op b, a.hi op b);                                                          \
    }
LIFT(<) LIFT(<=) LIFT(>) LIFT(>=) LIFT(==) LIFT(!=)
#undef LIFT
template <class T, class H> INLINE Pair<T, H> operator-(const Pair<T, H>& a) { return {-a.lo, -a.hi}; }
template <class T, class H> INLINE Pair<T, H> operator~(const Pair<T, H>& a) { return {~a.lo, ~a.hi}; }

#if defined(__AVX2__)
constexpr int REGISTER = 32;
template <class T, class Native> using Sixteen = Pair<T, Native>;
#else
constexpr int REGISTER = 16;
template <class T, class Native> using Sixteen = Pair<T, Pair<T, Native>>;
#endif
typedef float f32n __attribute__((vector_size(REGISTER)));
typedef int32_t i32n __attribute__((vector_size(REGISTER)));
typedef uint32_t u32n __attribute__((vector_size(REGISTER)));
typedef uint16_t u16n __attribute__((vector_size(REGISTER)));
typedef uint8_t u8n __attribute__((vector_size(REGISTER)));
typedef uint16_t u16half __attribute__((vector_size(REGISTER / 2)));  // as many lanes as u32n
typedef Sixteen<float, f32n> f32x16;
typedef Sixteen<int32_t, i32n> i32x16;
typedef Sixteen<uint32_t, u32n> u32x16;
typedef Sixteen<uint16_t, u16half> u16x16;
typedef Sixteen<uint16_t, u16n> u16x32;  // 16 pairs of bf16
typedef Sixteen<uint8_t, u8n> u8x64;     // 16 fours of codes

#endif

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

// Lanes from memory, and to it, whatever its alignment.
template <class V> INLINE void read(V& x, const void* p) { memcpy(&x, p, sizeof x); }
template <class V> INLINE void write(void* p, const V& x) { memcpy(p, &x, sizeof x); }
#if !defined(__AVX512F__)
template <class T, class H> INLINE void read(Pair<T, H>& x, const void* p) {
    read(x.lo, p);
    read(x.hi, static_cast<const char*>(p) + sizeof x.lo);
}
template <class T, class H> INLINE void write(void* p, const Pair<T, H>& x) {
    write(p, x.lo);
    write(static_cast<char*>(p) + sizeof x.lo, x.hi);
}
#endif

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

#if defined(__AVX512F__)
INLINE f32x16 broadcast(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE i32x16 broadcast(int32_t x) { return i32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE i32x16 lane_numbers() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
#else
#if defined(__AVX2__)
INLINE f32n native(float x) { return f32n{x, x, x, x, x, x, x, x}; }
INLINE i32n native(int32_t x) { return i32n{x, x, x, x, x, x, x, x}; }
template <class T, class N> INLINE Pair<T, N> repeat(N x) { return {x, x}; }
#else
INLINE f32n native(float x) { return f32n{x, x, x, x}; }
INLINE i32n native(int32_t x) { return i32n{x, x, x, x}; }
template <class T, class N> INLINE Pair<T, Pair<T, N>> repeat(N x) { return {{x, x}, {x, x}}; }
#endif
INLINE f32x16 broadcast(float x) { return repeat<float>(native(x)); }
INLINE i32x16 broadcast(int32_t x) { return repeat<int32_t>(native(x)); }
INLINE i32x16 lane_numbers() {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    i32x16 x;
    read(x, numbers);
    return x;
}
#endif
INLINE f32x16 zero() { return f32x16{}; }

INLINE f32x16 bits_to_f32(u32x16 x) { return (f32x16)x; }
INLINE u32x16 f32_to_bits(f32x16 x) { return (u32x16)x; }

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
#if defined(__AVX512F__)
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#else
INLINE f32n fma(f32n a, f32n b, f32n c) {
#if defined(__FMA__)
    return (f32n)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (f32n)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
template <class H>
INLINE Pair<float, H> fma(const Pair<float, H>& a, const Pair<float, H>& b, const Pair<float, H>& c) {
    return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
#endif

// Lanes converted, rather than their bits.
#if defined(__AVX512F__)
INLINE u32x16 to_u32(u16x16 x) { return __builtin_convertvector(x, u32x16); }
INLINE u16x16 low_halves(u32x16 x) { return __builtin_convertvector(x, u16x16); }
INLINE f32x16 to_f32(i32x16 x) { return __builtin_convertvector(x, f32x16); }
#else
INLINE u32n to_u32(u16half x) { return __builtin_convertvector(x, u32n); }
INLINE u16half low_halves(u32n x) { return __builtin_convertvector(x, u16half); }
INLINE f32n to_f32(i32n x) { return __builtin_convertvector(x, f32n); }
template <class H> INLINE auto to_u32(const Pair<uint16_t, H>& x) {
    return Pair<uint32_t, decltype(to_u32(x.lo))>{to_u32(x.lo), to_u32(x.hi)};
}
template <class H> INLINE auto low_halves(const Pair<uint32_t, H>& x) {
    return Pair<uint16_t, decltype(low_halves(x.lo))>{low_halves(x.lo), low_halves(x.hi)};
}
template <class H> INLINE auto to_f32(const Pair<int32_t, H>& x) {
    return Pair<float, decltype(to_f32(x.lo))>{to_f32(x.lo), to_f32(x.hi)};
}
#endif

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

INLINE f32x16 widen(u16x16 x, bf16) { return (f32x16)(to_u32(x) << 16); }

// Round to nearest even; a NaN stays one.
INLINE u16x16 narrow(f32x16 x, bf16) {
    u32x16 u = (u32x16)x;
    u32x16 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u32x16 nan = (u32x16)((i32x16)(x != x));
    rounded = (rounded & ~nan) | (((u >> 16) | 0x40) & nan);
    return low_halves(rounded);
}

#if !defined(__AVX512F__) && (defined(__F16C__) || defined(__aarch64__))
INLINE f32n widen_f16(u16half h) {
#if defined(__F16C__) && defined(__AVX2__)
    return (f32n)_mm256_cvtph_ps((__m128i)h);
#else
    return (f32n)vcvt_f32_f16((float16x4_t)h);
#endif
}
INLINE u16half narrow_f16(f32n x) {
#if defined(__F16C__) && defined(__AVX2__)
    return (u16half)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    return (u16half)vcvt_f16_f32((float32x4_t)x);
#endif
}
template <class H> INLINE auto widen_f16(const Pair<uint16_t, H>& x) {
    return Pair<float, decltype(widen_f16(x.lo))>{widen_f16(x.lo), widen_f16(x.hi)};
}
template <class H> INLINE auto narrow_f16(const Pair<float, H>& x) {
    return Pair<uint16_t, decltype(narrow_f16(x.lo))>{narrow_f16(x.lo), narrow_f16(x.hi)};
}
#define HAS_F16 1
#endif

INLINE f32x16 widen(u16x16 h, f16) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps((__m256i)h);
#elif defined(HAS_F16)
    return widen_f16(h);
#else
    u32x16 u = to_u32(h);
    // The exponent's bias by a product, which also makes a subnormal half normal; infinity and NaN by their bits.
    f32x16 magnitude = (f32x16)((u & 0x7fff) << 13) * 0x1p112f;
    u32x16 special = (u32x16)((i32x16)((u & 0x7c00) == 0x7c00)) & 0x7f800000;
    return (f32x16)((u32x16)magnitude | special | ((u & 0x8000) << 16));
#endif
}

INLINE u16x16 narrow(f32x16 x, f16) {
#if defined(__AVX512F__)
    return (u16x16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(HAS_F16)
    return narrow_f16(x);
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
    return low_halves(half | sign);
#endif
}

INLINE f32x16 load(const float* p) {
    f32x16 x;
    read(x, p);
    return x;
}
INLINE void store(float* p, f32x16 x) { write(p, x); }

template <class T> INLINE f32x16 load(const T* p) {
    u16x16 x;
    read(x, p);
    return widen(x, T{});
}
template <class T> INLINE void store(T* p, f32x16 x) {
    write(p, narrow(x, T{}));
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

// A whole cache line that will not be read soon: memory is written without being read first. `settle` before others
// read it.
INLINE void store_line(void* p, i32x16 x) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)x);
#else
    write(p, x);
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
// The low byte of every lane.
INLINE u8x16 low_bytes(i32x16 x) {
#if defined(__AVX512F__)
    return (u8x16)_mm512_cvtepi32_epi8((__m512i)x);
#else
    u8x16 bytes;
    for (int i = 0; i < 16; ++i) bytes[i] = (uint8_t)x[i];
    return bytes;
#endif
}

// ---- dot products that add to an accumulator per lane

INLINE u16x32 load_pairs(const bf16* p) {
    u16x32 x;
    read(x, p);
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
    read(x, p);
    return x;
}
INLINE i32x16 broadcast_four(const int8_t* p) {  // p[0..3] in every lane
    int32_t four;
    memcpy(&four, p, 4);
    return broadcast(four);
}
// acc + the four u8 of a lane times the four s8 of a lane, exactly; and the same for codes of at most 15.
#if defined(__AVX512VNNI__)
INLINE i32x16 dot_u8s8(i32x16 acc, u8x64 codes, i32x16 fours) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)fours);
}
INLINE i32x16 dot_u4s8(i32x16 acc, u8x64 codes, i32x16 fours) { return dot_u8s8(acc, codes, fours); }
#elif defined(__AVX512BW__)
INLINE i32x16 dot_u8s8(i32x16 acc, u8x64 codes, i32x16 fours) {
    // Sums of two products of bytes would saturate 16 bits: bytes are widened, evens and odds apart.
    __m512i w = (__m512i)codes, a = (__m512i)fours;
    __m512i w_even = _mm512_and_si512(w, _mm512_set1_epi16(0xff)), w_odd = _mm512_srli_epi16(w, 8);
    __m512i a_even = _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), a_odd = _mm512_srai_epi16(a, 8);
    __m512i even = _mm512_madd_epi16(w_even, a_even), odd = _mm512_madd_epi16(w_odd, a_odd);
    return acc + (i32x16)even + (i32x16)odd;
}
INLINE i32x16 dot_u4s8(i32x16 acc, u8x64 codes, i32x16 fours) {  // 2 * 15 * 127 fits 16 bits
    __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, (__m512i)fours);
    return acc + (i32x16)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__AVX512F__)
INLINE i32x16 dot_u8s8(i32x16 acc, u8x64 codes, i32x16 fours) {
    u32x16 w = (u32x16)codes;
    for (int i = 0; i < 4; ++i) acc += (i32x16)((w >> (8 * i)) & 0xff) * ((fours << (24 - 8 * i)) >> 24);
    return acc;
}
INLINE i32x16 dot_u4s8(i32x16 acc, u8x64 codes, i32x16 fours) { return dot_u8s8(acc, codes, fours); }
#else
INLINE i32n dot_u8s8(i32n acc, u8n codes, i32n fours) {
#if defined(__AVXVNNI__)
    return (i32n)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)codes, (__m256i)fours);
#elif defined(__AVX2__)
    // Sums of two products of bytes would saturate 16 bits: bytes are widened, evens and odds apart.
    __m256i w = (__m256i)codes, a = (__m256i)fours;
    __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), w_odd = _mm256_srli_epi16(w, 8);
    __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), a_odd = _mm256_srai_epi16(a, 8);
    __m256i even = _mm256_madd_epi16(w_even, a_even), odd = _mm256_madd_epi16(w_odd, a_odd);
    return acc + (i32n)even + (i32n)odd;
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (i32n)vusdotq_s32((int32x4_t)acc, (uint8x16_t)codes, (int8x16_t)fours);
#elif defined(__ARM_FEATURE_DOTPROD)
    // codes - 128 fits s8; 128 = 64 + 64 times the activations is added again.
    int8x16_t w = vreinterpretq_s8_u8(veorq_u8((uint8x16_t)codes, vdupq_n_u8(0x80))), a = (int8x16_t)fours;
    int32x4_t s = vdotq_s32((int32x4_t)acc, w, a);
    s = vdotq_s32(s, vdupq_n_s8(64), a);
    return (i32n)vdotq_s32(s, vdupq_n_s8(64), a);
#else
    u32n w = (u32n)codes;
    for (int i = 0; i < 4; ++i) acc += (i32n)((w >> (8 * i)) & 0xff) * ((fours << (24 - 8 * i)) >> 24);
    return acc;
#endif
}
INLINE i32n dot_u4s8(i32n acc, u8n codes, i32n fours) {
#if defined(__AVX2__) && !defined(__AVXVNNI__)
    __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)fours);  // 2 * 15 * 127 fits 16 bits
    return acc + (i32n)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
    return (i32n)vdotq_s32((int32x4_t)acc, (int8x16_t)codes, (int8x16_t)fours);
#else
    return dot_u8s8(acc, codes, fours);
#endif
}
template <class A, class B>
INLINE Pair<int32_t, A> dot_u8s8(const Pair<int32_t, A>& acc, const Pair<uint8_t, B>& codes,
                                 const Pair<int32_t, A>& fours) {
    return {dot_u8s8(acc.lo, codes.lo, fours.lo), dot_u8s8(acc.hi, codes.hi, fours.hi)};
}
template <class A, class B>
INLINE Pair<int32_t, A> dot_u4s8(const Pair<int32_t, A>& acc, const Pair<uint8_t, B>& codes,
                                 const Pair<int32_t, A>& fours) {
    return {dot_u4s8(acc.lo, codes.lo, fours.lo), dot_u4s8(acc.hi, codes.hi, fours.hi)};
}
#endif

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
