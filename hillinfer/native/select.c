/* Top-k of integer scores, largest first, ties to the lowest position. */
#include "common.h"

#define BINS 2048
#define SAMPLE 1024

struct item { uint32_t below; int32_t position; };  /* below: INT32_MAX - score */

/* A threshold that k of the scores reach, and few more: narrows [low, high] until the k-th largest score shares its bin
 * with few others. */
static int32_t floor_of(const int32_t *scores, int64_t n, int64_t k) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        low = scores[i] < low ? scores[i] : low;
        high = scores[i] > high ? scores[i] : high;
    }
    int64_t above = 0;  /* scores > high */
    while (1) {
        uint32_t range = (uint32_t)high - (uint32_t)low;
        int shift = range < BINS ? 0 : 21 - __builtin_clz(range);
        int32_t counts[BINS] = {0};
        for (int64_t i = 0; i < n; i++) {
            uint32_t bin = ((uint32_t)high - (uint32_t)scores[i]) >> shift;
            if (scores[i] <= high && bin < BINS) counts[bin]++;
        }
        int64_t seen = above;
        uint32_t bin = 0;
        while (seen + counts[bin] < k) seen += counts[bin++];
        int64_t floor_ = (int64_t)high - (((int64_t)bin + 1) << shift) + 1;
        low = floor_ < low ? low : (int32_t)floor_;
        if (shift == 0 || counts[bin] <= k / 4 + 64) return low;
        above = seen;
        high = (int32_t)((int64_t)high - ((int64_t)bin << shift));
    }
}

/* Positions of the scores that reach a floor, ascending; returns their number. `at` holds up to n + 16. */
static int64_t reaching(const int32_t *scores, int64_t from, int64_t n, int32_t floor_, int32_t *at) {
    int64_t m = 0;
    for (int64_t i = from; i < n; i++) {
        at[m] = (int32_t)i;
        m += scores[i] >= floor_;
    }
    return m;
}

#if defined(__x86_64__)
AVX512 static int64_t reaching_avx512(const int32_t *scores, int64_t n, int32_t floor_, int32_t *at) {
    const __m512i least = _mm512_set1_epi32(floor_), step = _mm512_set1_epi32(16);
    __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    int64_t m = 0, i = 0;
    for (; i + 16 <= n; i += 16, places = _mm512_add_epi32(places, step)) {
        __mmask16 in = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(scores + i), least);
        _mm512_storeu_si512(at + m, _mm512_maskz_compress_epi32(in, places));
        m += __builtin_popcount(in);
    }
    return m + reaching(scores, i, n, floor_, at + m);
}
#endif

static int64_t items_of(int isa, const int32_t *scores, int64_t n, int32_t floor_, struct item *items) {
    int32_t *at = (int32_t *)(items + n + 16) - (n + 16);  /* second half: items are read before overwritten */
    int64_t m;
#if defined(__x86_64__)
    m = isa >= ISA_AVX512 ? reaching_avx512(scores, n, floor_, at) : reaching(scores, 0, n, floor_, at);
#else
    m = reaching(scores, 0, n, floor_, at);
#endif
    for (int64_t j = 0; j < m; j++) {
        int32_t i = at[j];
        items[j] = (struct item){(uint32_t)INT32_MAX - (uint32_t)scores[i], i};
    }
    return m;
}

/* Estimates a floor that slightly more than k scores reach from a sample; counts all scores only if it was too high. */
static int64_t best_first(int isa, const int32_t *scores, int64_t n, int64_t k, int32_t *out, struct item *items,
                          struct item *spare) {
    int64_t step = n / SAMPLE, m = 0;
    if (step > 1 && k < n / 2) {
        int32_t some[SAMPLE];
        for (int i = 0; i < SAMPLE; i++) some[i] = scores[i * step];
        m = items_of(isa, scores, n, floor_of(some, SAMPLE, k * 5 / 4 / step + 16), items);
    }
    if (m < k) m = items_of(isa, scores, n, floor_of(scores, n, k), items);
    uint32_t least = UINT32_MAX, most = 0;
    for (int64_t i = 0; i < m; i++) {
        least = items[i].below < least ? items[i].below : least;
        most = items[i].below > most ? items[i].below : most;
    }
    for (int shift = 0; shift < 32 && (most - least) >> shift; shift += 11) {  /* stable: positions ascend */
        int32_t starts[BINS] = {0};
        for (int64_t i = 0; i < m; i++) starts[(items[i].below - least) >> shift & (BINS - 1)]++;
        for (int32_t b = 0, at = 0; b < BINS; b++) {
            int32_t count = starts[b];
            starts[b] = at;
            at += count;
        }
        for (int64_t i = 0; i < m; i++) spare[starts[(items[i].below - least) >> shift & (BINS - 1)]++] = items[i];
        struct item *swap = items;
        items = spare;
        spare = swap;
    }
    for (int64_t i = 0; i < k; i++) out[i] = items[i].position;
    return k;
}

/* Positions of the k <= n largest scores (n,) into out (k,). Returns k, or NO_MEMORY. */
int64_t hi_topk(int isa, const int32_t *scores, int64_t n, int64_t k, int32_t *out) {
    struct item *items = malloc((n + 16) * sizeof(struct item) * 2);
    if (!items) return NO_MEMORY;
    if (k) best_first(isa, scores, n, k, out, items, items + n + 16);
    free(items);
    return k;
}
