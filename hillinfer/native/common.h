/* What the kernels share. Every kernel is compiled for several instruction sets in one library, and Python says which
 * to use: a library that is cached or copied to another machine never meets an instruction that is missing there.
 * No -march=native: it lets gcc 12 vectorise int8 products into wrong sums on VNNI machines. */
#pragma once
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")))
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#define INLINE static inline __attribute__((always_inline))

enum { GENERIC, NEON, ISA_AVX2, ISA_AVX512 };  /* in the order of speed */
enum { FP32, BF16, FP16 };
#define MAX_THREADS 64
#define MAX_DIM 1024  /* of a head, where a kernel keeps rows of it on its stack */

/* Runs work(job, share) for every share; the caller does the last one. Threads live for one call: they cannot spin,
 * and a fork finds none of them. */
struct share { void (*work)(void *, int); void *job; int index; };
void *run_share(void *share);
void split(void (*work)(void *, int), void *job, int threads);
int64_t hi_checksums(int isa, int write, int64_t n, const int64_t *offsets, const int64_t *addresses,
                     const int64_t *lengths, uint32_t *sums);
