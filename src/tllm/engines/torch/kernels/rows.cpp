// What sampling wants of rows of logits: the greatest, sums of exponentials, and the few tokens that can win. The decision
// among those is the host's (`engines/sampling.py`), so nothing here need be exact beyond what is said of it.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "vec.h"

namespace {

constexpr int LANES = 16;
constexpr int BLOCK = 128;  // elements whose greatest or least is looked at before they are

// Mirrored in rows.py.
struct Request {
    const float* values;
    double temperature;
    uint32_t first_key, second_key;  // of the noise
    int32_t num_leading;             // so many of the greatest, or some more; 0: none
    int32_t num_contenders;          // so many of the least delay; 0: none
    int64_t wants_mass;
};
struct Answer {
    double mass;          // sum of exp((value - peak) / temperature), to 1e-13
    float peak;           // the greatest value; NaN if any value is
    int32_t best;         // its first place
    float least_delay;    // of those that are no contenders, to 1e-4; infinity if there are none
    int32_t num_leading;  // ids found; -1: they were more than there is room for
    int32_t whole;        // whether all that is not -infinity is among them
    int32_t num_contenders;
};

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

template <class T> INLINE bool any(T mask) {
    uint64_t parts[8], all = 0;
    memcpy(parts, &mask, 64);
    for (int i = 0; i < 8; ++i) all |= parts[i];
    return all != 0;
}
INLINE float least(f32x16 x) { return -largest(-x); }

// Calls f(vector, first element, number of elements) for every vector of a row; `fill` stands behind the row's end.
template <class F> INLINE void each(const float* values, int64_t first, int64_t stop, float fill, F f) {
    int64_t i = first;
    for (; i + LANES <= stop; i += LANES) f(load(values + i), i);
    if (i < stop) {
        int n = stop - i;
        f(select(lane_numbers() < n, load(values + i, n), broadcast(fill)), i);
    }
}

// e^x to 1e-15 for x <= 0; 0 below -700. No NaN comes here.
INLINE f64x8 exp_wide(f64x8 x) {
    constexpr double shift = 0x1.8p52;
    i64x8 vanishes = x < -700.0;
    x = (f64x8)((i64x8)x & ~vanishes);
    f64x8 shifted = x * 1.4426950408889634 + shift;
    f64x8 n = shifted - shift;
    f64x8 r = (x - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;  // ln 2 in two parts, the first of 42 bits
    f64x8 p = r * (1.0 / 479001600) + 1.0 / 39916800;                      // the series: |r| <= 0.35
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r * r + r + 1.0;
    p = p * (f64x8)(((i64x8)shifted + 1023) << 52);
    return (f64x8)((i64x8)p & ~vanishes);
}

void find_peak(const float* values, int64_t size, float* block_peaks, Answer& answer) {
    f32x16 most = broadcast(-__builtin_inff());
    i32x16 nan = {};
    for (int64_t first = 0, b = 0; first < size; first += BLOCK, ++b) {
        f32x16 here = broadcast(-__builtin_inff());
        each(values, first, std::min(first + BLOCK, size), -__builtin_inff(), [&](f32x16 x, int64_t) {
            here = max(here, x);
            nan |= x != x;
        });
        block_peaks[b] = largest(here);
        most = max(most, here);
    }
    answer.peak = any(nan) ? __builtin_nanf("") : largest(most);
    answer.best = 0;
    for (int64_t b = 0; b * BLOCK < size; ++b)
        if (block_peaks[b] == answer.peak) {
            int64_t i = b * BLOCK;
            while (values[i] != answer.peak) ++i;
            answer.best = i;
            break;
        }
}

double sum_weights(const float* values, int64_t size, float peak, double temperature) {
    f64x8 total = {};
    double inverse_temperature = 1 / temperature;
    each(values, 0, size, -__builtin_inff(), [&](f32x16 x, int64_t) {
        for (int i = 0; i < 2; ++i) {
            f64x8 wide = __builtin_convertvector((part_of<f32x16, f32x8>(x, i)), f64x8);
            total += exp_wide((wide - (double)peak) * inverse_temperature);
        }
    });
    double result = 0;
    for (int i = 0; i < 8; ++i) result += total[i];
    return result;
}

// All values that are at least the n-th greatest block's greatest: n or more, and no smaller one among them.
int find_leading(const float* values, int64_t size, const float* block_peaks, int n, int32_t* ids, int room, int32_t* whole) {
    int64_t num_blocks = (size + BLOCK - 1) / BLOCK;
    float threshold = -__builtin_inff();
    if (n < num_blocks) {
        std::vector<float> peaks(block_peaks, block_peaks + num_blocks);
        std::nth_element(peaks.begin(), peaks.begin() + n - 1, peaks.end(), [](float a, float b) { return a > b; });
        threshold = peaks[n - 1];
    }
    *whole = threshold == -__builtin_inff();
    if (*whole) threshold = -__FLT_MAX__;
    int found = 0;
    for (int64_t b = 0; b < num_blocks; ++b) {
        if (block_peaks[b] < threshold) continue;
        int64_t stop = std::min((b + 1) * BLOCK, size);
        if (found + (stop - b * BLOCK) > room) return -1;
        for (int64_t i = b * BLOCK; i < stop; ++i) {
            ids[found] = i;
            found += values[i] >= threshold;
        }
    }
    return found;
}

INLINE u32x16 mix(u32x16 x) {  // lowbias32
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
}

// The n ids of the least delay (1 - u) / w, u being the id's uniform number and w its weight; ascending ids.
int find_contenders(const float* values, int64_t size, const Request& request, float peak, int32_t* ids, float* least_delay) {
    struct Contender {
        float delay;
        int32_t id;
    };
    int n = request.num_contenders;
    std::vector<Contender> best;  // n + 1 of them, the least first
    best.reserve(n + 2);
    float bound = __builtin_inff(), inverse_temperature = 1 / request.temperature;
    float delays[BLOCK];
    for (int64_t first = 0; first < size; first += BLOCK) {
        int64_t stop = std::min(first + BLOCK, size);
        f32x16 here = broadcast(__builtin_inff());
        each(values, first, stop, -__builtin_inff(), [&](f32x16 x, int64_t i) {
            u32x16 id = (u32x16)(lane_numbers() + (int32_t)i);
            u32x16 hash = ~mix(mix(id ^ request.first_key) ^ request.second_key);
            // As signed numbers of 31 bits, twice: there is an instruction for those everywhere.
            f32x16 rest = to_f32((i32x16)(hash >> 1)) * 2.0f + to_f32((i32x16)(hash & 1)) + 0.5f;
            f32x16 delay = rest * 0x1p-32f * exp((peak - x) * inverse_temperature);
            store(delays + (i - first), delay);
            here = min(here, delay);
        });
        if (least(here) >= bound) continue;
        for (int64_t i = first; i < stop; ++i) {
            float delay = delays[i - first];
            if (delay >= bound) continue;
            Contender mine{delay, (int32_t)i};
            best.insert(std::upper_bound(best.begin(), best.end(), mine, [](const Contender& a, const Contender& b) { return a.delay < b.delay; }), mine);
            if ((int)best.size() > n + 1) best.pop_back();
            if ((int)best.size() == n + 1) bound = best.back().delay;
        }
    }
    int found = std::min<int>(n, best.size());
    *least_delay = (int)best.size() > n ? best[n].delay : __builtin_inff();
    for (int i = 0; i < found; ++i) ids[i] = best[i].id;
    std::sort(ids, ids + found);
    return found;
}

}  // namespace

// `leading` is [rows][leading_room], `contenders` [rows][contenders_room].
extern "C" void tllm_narrow_rows(const Request* requests, Answer* answers, int64_t num_rows, int64_t size, int32_t* leading, int64_t leading_room, int32_t* contenders, int64_t contenders_room) {
#pragma omp parallel for schedule(dynamic) if (num_rows > 1)
    for (int64_t r = 0; r < num_rows; ++r) {
        const Request& request = requests[r];
        Answer& answer = answers[r];
        std::vector<float> block_peaks((size + BLOCK - 1) / BLOCK);
        find_peak(request.values, size, block_peaks.data(), answer);
        answer.mass = 0;
        answer.num_leading = answer.whole = answer.num_contenders = 0;
        answer.least_delay = __builtin_inff();
        if (!(answer.peak - answer.peak == 0)) continue;  // not finite: nothing can be chosen
        if (request.wants_mass) answer.mass = sum_weights(request.values, size, answer.peak, request.temperature);
        if (request.num_leading) answer.num_leading = find_leading(request.values, size, block_peaks.data(), request.num_leading, leading + r * leading_room, leading_room, &answer.whole);
        if (request.num_contenders) answer.num_contenders = find_contenders(request.values, size, request, answer.peak, contenders + r * contenders_room, &answer.least_delay);
    }
}
