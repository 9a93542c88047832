/* Shared declarations. One library holds each kernel for several instruction sets, and Python selects one at run time:
 * a library cached or copied to another machine never executes an instruction that machine lacks.
 * No -march=native: with it gcc 12 vectorises int8 products into wrong sums on VNNI machines. */
#pragma once
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")))
#if defined(__clang__) || __GNUC__ >= 10
#define PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")))
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#define INLINE static inline __attribute__((always_inline))

enum { GENERIC, NEON, ISA_AVX2, ISA_AVX512, ISA_BF16 };  /* slowest first */
enum { FP32, BF16, FP16 };
#define MAX_THREADS 64
#define MAX_DIM 1024  /* largest head dimension of kernels with rows on the stack */
#define MAX_CODED 1040  /* largest head dimension of key codes: with more, fp32 sums of their products are inexact */
enum { NO_MEMORY = -1, WRONG = -2 };  /* results; WRONG: a position or address that must not be followed */

/* Runs work(job, share) for every share, the last one on the calling thread. Threads live for one call: none spin
 * between calls, and a fork inherits none. */
struct share { void (*work)(void *, int); void *job; int index; };
void *run_share(void *share);
void split(void (*work)(void *, int), void *job, int threads);

/* Whether all addresses are multiples of `unit` bytes and none is null. */
INLINE int usable(const int64_t *addresses, int64_t n, int64_t unit) {
    int64_t any = 0, null = 0;
    for (int64_t i = 0; i < n; i++) {
        any |= addresses[i];
        null |= !addresses[i];
    }
    return !null && any % unit == 0;
}

int64_t hi_checksums(int isa, int write, int64_t n, const int64_t *offsets, const int64_t *addresses,
                     const int64_t *lengths, uint32_t *sums);
