// What this library was compiled for, and how many threads a region of it gets.
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
