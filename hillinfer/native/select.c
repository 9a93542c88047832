/* The k best of integer scores, best first, ties to the lowest position; and one selection for all heads. */
#include "common.h"

#define BINS 2048

struct item { uint32_t below; int32_t position; };  /* below: how far the score is from the best */

/* Narrows [low, high] until the bin that holds the k-th best has few others; then sorts what lies above its floor. */
static int64_t best_first(const int32_t *scores, int64_t n, int64_t k, int32_t *out, struct item *items,
                          struct item *spare) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        low = scores[i] < low ? scores[i] : low;
        high = scores[i] > high ? scores[i] : high;
    }
    const int32_t top = high;
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
        if (shift == 0 || counts[bin] <= k / 4 + 64) {
            low = floor_ < low ? low : (int32_t)floor_;
            break;
        }
        above = seen;
        high = (int32_t)((int64_t)high - ((int64_t)bin << shift));
        low = floor_ < low ? low : (int32_t)floor_;
    }
    int64_t m = 0;
    for (int64_t i = 0; i < n; i++) {
        items[m] = (struct item){(uint32_t)top - (uint32_t)scores[i], (int32_t)i};
        m += scores[i] >= low;
    }
    uint32_t most = (uint32_t)top - (uint32_t)low;
    for (int shift = 0; shift < 32 && most >> shift; shift += 11) {  /* stable, so that positions stay in order */
        int32_t starts[BINS] = {0};
        for (int64_t i = 0; i < m; i++) starts[items[i].below >> shift & (BINS - 1)]++;
        for (int32_t b = 0, at = 0; b < BINS; b++) {
            int32_t count = starts[b];
            starts[b] = at;
            at += count;
        }
        for (int64_t i = 0; i < m; i++) spare[starts[items[i].below >> shift & (BINS - 1)]++] = items[i];
        struct item *swap = items;
        items = spare;
        spare = swap;
    }
    for (int64_t i = 0; i < k; i++) out[i] = items[i].position;
    return k;
}

/* Positions of the k <= n best of scores (n,) into out (k,). Returns k, or -1 where memory is out. */
int64_t hi_topk(const int32_t *scores, int64_t n, int64_t k, int32_t *out) {
    struct item *items = malloc((n + 1) * sizeof(struct item) * 2);
    if (!items) return -1;
    if (k) best_first(scores, n, k, out, items, items + n + 1);
    free(items);
    return k;
}

struct merge {
    const int32_t *scores;
    int64_t stride, n, ranks;
    int heads, threads;
    int32_t *ordered;  /* (heads, ranks) */
    struct item *items;  /* (threads, 2, n + 1) */
};

static void merge_share(void *job, int share) {
    struct merge *m = job;
    struct item *own = m->items + 2 * share * (m->n + 1);
    for (int h = share; h < m->heads; h += m->threads)
        best_first(m->scores + h * m->stride, m->n, m->ranks, m->ordered + h * m->ranks, own, own + m->n + 1);
}

/* Heads take turns, each with its next best, until k <= n different positions are in; out (k,) ascending.
 * The first ranks mostly do, so that few are sorted; where they do not, twice as many are. */
int64_t hi_merge(const int32_t *scores, int64_t stride, int heads, int64_t n, int64_t k, int64_t *out, int threads) {
    threads = threads < heads ? threads : heads;
    struct merge m = {.scores = scores, .stride = stride, .n = n, .heads = heads, .threads = threads};
    m.items = malloc((n + 1) * sizeof(struct item) * 2 * threads);
    m.ordered = malloc((k + 1) * sizeof(int32_t) * heads);
    uint8_t *in = malloc(n + 1);
    if (!m.items || !m.ordered || !in) {
        k = -1;
    } else if (k) {
        int64_t count = 0;
        for (m.ranks = 2 * k / heads + 16; count < k; m.ranks *= 2) {
            m.ranks = m.ranks < k ? m.ranks : k;
            split(merge_share, &m, threads);
            memset(in, 0, n);
            count = 0;
            for (int64_t r = 0; r < m.ranks && count < k; r++)
                for (int h = 0; h < heads && count < k; h++) {
                    uint8_t *seen = in + m.ordered[h * m.ranks + r];
                    count += !*seen;
                    *seen = 1;
                }
        }
        int64_t at = 0;
        for (int64_t i = 0; i < n && at < k; i++) {
            out[at] = i;
            at += in[i];
        }
    }
    free(m.items);
    free(m.ordered);
    free(in);
    return k;
}
