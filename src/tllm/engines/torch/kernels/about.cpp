// What this library was compiled for, how many threads a region of it gets and how fast those read.
#include <omp.h>

#include "vec.h"

extern "C" const char* tllm_instructions() {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    return "AVX-512 with BF16 and VNNI";
#elif defined(__AVX512VNNI__)
    return "AVX-512 with VNNI";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVXVNNI__)
    return "AVX2 with VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return "NEON with I8MM";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "NEON with dot products";
#elif defined(__aarch64__)
    return "NEON";
#else
    return "any processor of its kind";
#endif
}

extern "C" int tllm_num_threads() {
    int num_threads = 0;
#pragma omp parallel
#pragma omp single
    num_threads = omp_get_num_threads();
    return num_threads;
}

// Reads so many bytes, a multiple of 1024, on all threads and returns their sum, so that the time is that of memory.
extern "C" int64_t tllm_read(const uint8_t* data, int64_t num_bytes) {
    int64_t total = 0;
#pragma omp parallel reduction(+ : total)
    {
        i32x16 sums[4] = {};
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_bytes / 1024; ++i)
            for (const uint8_t* p = data + 1024 * i; p < data + 1024 * (i + 1); p += 256)
                for (int j = 0; j < 4; ++j) {
                    prefetch(p + 8192 + 64 * j);
                    i32x16 x;
                    read(x, p + 64 * j);
                    sums[j] += x;
                }
        total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return total;
}
