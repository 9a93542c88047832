/* The machine: its instruction sets, threads per call, and memory bandwidth. */
#include "common.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* Bit mask of this machine's instruction sets. */
int hi_isas(void) {
    int found = 1 << GENERIC;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= 1 << ISA_AVX2;
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        found |= 1 << ISA_AVX512;
#ifdef PAIRS
    unsigned a, b, c, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    int tiles = d >> 22 & 1;  /* AMX: torch's own attention is faster */
    if (found >> ISA_AVX512 & 1 && __builtin_cpu_supports("avx512bf16") && !tiles) found |= 1 << ISA_BF16;
#endif
#elif defined(__aarch64__)
    found |= 1 << NEON;
#endif
    return found;
}

void *run_share(void *pointer) {
    struct share *share = pointer;
    share->work(share->job, share->index);
    return NULL;
}

void split(void (*work)(void *, int), void *job, int threads) {
    pthread_t ids[MAX_THREADS];
    struct share shares[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    for (int i = 0; i < threads - 1; i++) {
        shares[i] = (struct share){work, job, i};
        started[i] = pthread_create(&ids[i], NULL, run_share, &shares[i]) == 0;
    }
    work(job, threads - 1);
    for (int i = 0; i < threads - 1; i++) {
        if (started[i]) pthread_join(ids[i], NULL);
        else work(job, i);
    }
}

INLINE uint64_t sum(const uint64_t *from, int64_t n) {
    uint64_t all = 0;
    for (int64_t i = 0; i < n; i++) all += from[i];
    return all;
}

static uint64_t sum_generic(const uint64_t *from, int64_t n) { return sum(from, n); }
#if defined(__x86_64__)
AVX2 static uint64_t sum_avx2(const uint64_t *from, int64_t n) { return sum(from, n); }
AVX512 static uint64_t sum_avx512(const uint64_t *from, int64_t n) { return sum(from, n); }
#endif

struct reading { int isa, threads; const uint64_t *from; int64_t n; uint64_t sums[MAX_THREADS]; };

static void read_share(void *job, int share) {
    struct reading *r = job;
    int64_t from = r->n * share / r->threads, n = r->n * (share + 1) / r->threads - from;
#if defined(__x86_64__)
    if (r->isa >= ISA_AVX2) {
        r->sums[share] = (r->isa >= ISA_AVX512 ? sum_avx512 : sum_avx2)(r->from + from, n);
        return;
    }
#endif
    r->sums[share] = sum_generic(r->from + from, n);
}

/* The sum of n words. */
uint64_t hi_read(int isa, const uint64_t *from, int64_t n, int threads) {
    struct reading r = {.isa = isa, .threads = threads, .from = from, .n = n};
    split(read_share, &r, threads);
    uint64_t all = 0;
    for (int i = 0; i < threads; i++) all += r.sums[i];
    return all;
}
