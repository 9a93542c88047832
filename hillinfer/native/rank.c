/* Log-probabilities of scores in fixed point: 4096 steps to a factor of two. All sums are of integers, so that no order
 * of summation and no split over threads or devices changes a bit. */
#include "common.h"

#define PART 1024  /* weights of at most 2^20 whose sum fits in 32 bits */

struct rank {
    int isa, heads, threads;
    const int32_t *scores;  /* (heads, n) */
    int64_t n;
    const float *unit;  /* (heads,): steps of one score */
    int32_t *out;  /* (threads, n) */
};

/* Steps from a score up to its head's highest, at most 2^30. */
INLINE int32_t below(int32_t most, int32_t score, float unit) {
    float steps = (float)((uint32_t)most - (uint32_t)score) * unit;
    return (int32_t)(steps < 1073741824.0f ? steps : 1073741824.0f);
}

/* About 2^20 * 2^(-steps / 4096): linear between powers of two. */
INLINE uint32_t weight(int32_t steps) {
    uint32_t whole = steps >> 12, y = (8192 - (steps & 4095)) << 7;
    return whole > 31 ? 0 : y >> whole;
}

/* log2(sum) - 20 in steps, for a sum of at least 2^20: a bit of the fraction for each squaring. */
static int32_t level_of(uint64_t sum) {
    int whole = 63 - __builtin_clzll(sum);
    uint64_t m = whole > 31 ? sum >> (whole - 31) : sum << (31 - whole);
    int32_t fraction = 0;
    for (int i = 0; i < 12; i++) {
        m = m * m >> 31;
        fraction = fraction << 1 | (m >> 32);
        m >>= m >> 32;
    }
    return ((whole - 20) << 12) + fraction;
}

INLINE void rank_heads(const struct rank *r, int share) {
    int32_t *out = r->out + share * r->n;
    for (int h = share; h < r->heads; h += r->threads) {  /* a head's scores stay in the cache for all three loops */
        const int32_t *scores = r->scores + h * r->n;
        const float unit = r->unit[h];
        int32_t most = INT32_MIN;
        for (int64_t i = 0; i < r->n; i++) most = scores[i] > most ? scores[i] : most;
        uint64_t sum = 0;
        for (int64_t at = 0; at < r->n; at += PART) {
            int64_t end = at + PART < r->n ? at + PART : r->n;
            uint32_t part = 0;
            for (int64_t i = at; i < end; i++) part += weight(below(most, scores[i], unit));
            sum += part;
        }
        const int32_t level = level_of(sum);
        if (h == share)
            for (int64_t i = 0; i < r->n; i++) out[i] = -below(most, scores[i], unit) - level;
        else
            for (int64_t i = 0; i < r->n; i++) {
                int32_t own = -below(most, scores[i], unit) - level;
                out[i] = out[i] > own ? out[i] : own;
            }
    }
}

#if defined(__x86_64__)
AVX512 static void rank_avx512(const struct rank *r, int share) { rank_heads(r, share); }
AVX2 static void rank_avx2(const struct rank *r, int share) { rank_heads(r, share); }
#endif

static void rank_share(void *job, int share) {
    const struct rank *r = job;
#if defined(__x86_64__)
    if (r->isa >= ISA_AVX512) return rank_avx512(r, share);
    if (r->isa == ISA_AVX2) return rank_avx2(r, share);
#endif
    rank_heads(r, share);
}

/* out: (threads, n), the first row is the result: for each token the highest log-probability of any head. */
void hi_ranks(int isa, const int32_t *scores, int heads, int64_t n, const float *unit, int32_t *out, int threads) {
    struct rank r = {isa, heads, threads, scores, n, unit, out};
    split(rank_share, &r, threads);
    for (int t = 1; t < threads; t++)
        for (int64_t i = 0; i < n; i++) out[i] = out[i] > out[t * n + i] ? out[i] : out[t * n + i];
}
