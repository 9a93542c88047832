/* What a core reads from memory, as the bound that kernels are held against. */
#include "common.h"

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
        r->sums[share] = (r->isa == ISA_AVX512 ? sum_avx512 : sum_avx2)(r->from + from, n);
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
