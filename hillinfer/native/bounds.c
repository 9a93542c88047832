/* Upper bounds of q.k over boxes of keys: int8 (heads, 2, dim) as (max, min), with per-channel scales of their page.
 * Each box is read once: its codes become fp32; page scales and query signs are folded into the coefficients. */
#include "common.h"

struct bounding {
    int isa, heads, group, dim, threads;
    const int64_t *boxes, *scales;  /* addresses (n,) of boxes and of their pages' scales, fp32 (heads, dim) */
    const uint8_t *leaf;  /* (n,): estimate with `slack` instead of bounding */
    int64_t n;
    const float *query;  /* (heads, group, dim) */
    float slack, *out, *room;  /* out: (heads, group, n); room: coefficients, 2 * size per thread */
    int64_t size;  /* whole cache lines: alignment decides the order of summation */
};

/* Coefficients of the codes of max and min, (heads, group, 2 dim). */
INLINE void fold(const struct bounding *b, const float *scale, float up, float down, float *to, const int dim) {
    for (int h = 0; h < b->heads; h++)
        for (int g = 0; g < b->group; g++, to += 2 * dim) {
            const float *q = b->query + (h * b->group + g) * dim, *s = scale + h * dim;
#pragma omp simd
            for (int d = 0; d < dim; d++) {
                float x = q[d] * s[d], above = x > 0 ? x : 0, below = x < 0 ? x : 0;
                to[d] = up * above + down * below;
                to[dim + d] = up * below + down * above;
            }
        }
}

INLINE void boxes(const struct bounding *b, int share, const int dim) {
    float *own[2] = {b->room + 2 * share * b->size, b->room + (2 * share + 1) * b->size};
    float codes[2 * MAX_DIM] __attribute__((aligned(64)));
    int64_t page[2] = {0}, end = b->n * (share + 1) / b->threads;  /* pages of the cached coefficients */
    for (int64_t i = b->n * share / b->threads; i < end; i++) {
        const int kind = b->leaf[i];
        if (b->scales[i] != page[kind]) {
            float slack = kind ? b->slack : 1;
            fold(b, (const float *)b->scales[i], (1 + slack) / 2, (1 - slack) / 2, own[kind], dim);
            page[kind] = b->scales[i];
        }
        if (i + 2 < end)
            for (int at = 0; at < 2 * b->heads * dim; at += 64) __builtin_prefetch((const char *)b->boxes[i + 2] + at);
        for (int h = 0; h < b->heads; h++) {
            const int8_t *box = (const int8_t *)b->boxes[i] + 2 * h * dim;
#pragma omp simd
            for (int d = 0; d < 2 * dim; d++) codes[d] = box[d];
            for (int g = 0; g < b->group; g++) {
                const float *c = own[kind] + (int64_t)(h * b->group + g) * 2 * dim;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int d = 0; d < 2 * dim; d++) sum += codes[d] * c[d];
                b->out[(int64_t)(h * b->group + g) * b->n + i] = sum;
            }
        }
    }
}

INLINE void boxes_of(const struct bounding *b, int share) {
    if (b->dim == 64) boxes(b, share, 64);
    else if (b->dim == 128) boxes(b, share, 128);
    else boxes(b, share, b->dim);
}

static void boxes_generic(const struct bounding *b, int share) { boxes_of(b, share); }
#if defined(__x86_64__)
AVX2 static void boxes_avx2(const struct bounding *b, int share) { boxes_of(b, share); }
AVX512 static void boxes_avx512(const struct bounding *b, int share) { boxes_of(b, share); }
#endif

static void bounds_share(void *job, int share) {
    const struct bounding *b = job;
#if defined(__x86_64__)
    if (b->isa >= ISA_AVX512) { boxes_avx512(b, share); return; }
    if (b->isa == ISA_AVX2) { boxes_avx2(b, share); return; }
#endif
    boxes_generic(b, share);
}

/* dim <= MAX_DIM. Returns 0, NO_MEMORY, or WRONG for an address that is null or not aligned. */
int hi_bounds(int isa, const int64_t *boxes, const int64_t *scales, const uint8_t *leaf, int64_t n, const float *query,
              int heads, int group, int dim, float slack, float *out, int threads) {
    const int64_t size = ((int64_t)heads * group * 2 * dim + 15) / 16 * 16;
    if (!usable(boxes, n, 1) || !usable(scales, n, sizeof(float))) return WRONG;
    float *room = aligned_alloc(64, sizeof(float) * 2 * size * threads);
    if (!room) return NO_MEMORY;
    struct bounding b = {isa, heads, group, dim, threads, boxes, scales, leaf, n, query, slack, out, room, size};
    split(bounds_share, &b, threads);
    free(room);
    return 0;
}
