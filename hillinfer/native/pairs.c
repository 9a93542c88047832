/* Attention of many query tokens over records in bf16: products of pairs, summed in fp32 (AVX512-BF16). Weights are
 * rounded to bf16, as in torch's flash attention, whose products of such matrices take twice the time where MKL computes
 * them in fp32. Keys and values of a tile are laid out as pairs once for all queries. */
#include "attend.h"

#ifdef PAIRS
/* c (rows, width) += a (rows, n) . b (n, width) of pairs; width is a multiple of 64. */
PAIRS static void multiply(const uint32_t *a, int rows, int n, const uint32_t *b, int width, float *c) {
    for (int j = 0; j < rows; j += 4) {
        const int left = rows - j < 4 ? rows - j : 4;
        const uint32_t *own[4];
        for (int r = 0; r < 4; r++) own[r] = a + (int64_t)(j + (r < left ? r : 0)) * n;
        for (int x = 0; x < width; x += 64) {
            __m512 sum[4][4];
            float *to = c + (int64_t)j * width + x;
            for (int r = 0; r < 4; r++)
                for (int v = 0; v < 4; v++)
                    sum[r][v] = r < left ? _mm512_loadu_ps(to + r * width + 16 * v) : _mm512_setzero_ps();
            for (int i = 0; i < n; i++) {
                __m512bh column[4];
                for (int v = 0; v < 4; v++)
                    column[v] = (__m512bh)_mm512_loadu_si512(b + (int64_t)i * width + x + 16 * v);
                for (int r = 0; r < 4; r++) {
                    const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)own[r][i]);
                    for (int v = 0; v < 4; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, column[v]);
                }
            }
            for (int r = 0; r < left; r++)
                for (int v = 0; v < 4; v++) _mm512_storeu_ps(to + r * width + 16 * v, sum[r][v]);
        }
    }
}

PAIRS void attend_pairs(const struct attend *a, int share) {
    const int group = a->group, dim = a->dim, half = dim / 2, all = a->heads * group;
    float *most = a->state + share * a->each, *sum = most + all, *outs = sum + all;
    float *logits = outs + (int64_t)all * dim;  /* (group, PAIR_TILE) */
    uint32_t *weights = (uint32_t *)(logits + group * PAIR_TILE), *part = weights + group * PAIR_TILE / 2;
    const int64_t end = a->n * (share + 1) / a->threads;
    for (int j = 0; j < all; j++) most[j] = -__builtin_inff();
    memset(sum, 0, sizeof(float) * all * (dim + 1));
    for (int64_t at = a->n * share / a->threads; at < end; at += PAIR_TILE) {
        const int m = end - at < PAIR_TILE ? (int)(end - at) : PAIR_TILE;
        for (int h = 0; h < a->heads; h++) {
            const char *keys = a->base + at * a->stride + (int64_t)h * dim * 2;
            for (int t = 0; t < PAIR_TILE; t++) {  /* past the end the last one again, of no weight */
                const uint32_t *key = (const uint32_t *)(keys + (t < m ? t : m - 1) * a->stride);
                for (int i = 0; i < half; i++) part[i * PAIR_TILE + t] = key[i];
                for (int b = 0; b < dim * 2; b += 64) {  /* the next head's */
                    __builtin_prefetch((const char *)(key + half) + b);
                    __builtin_prefetch((const char *)(key + half) + a->side + b);
                }
            }
            memset(logits, 0, sizeof(float) * group * PAIR_TILE);
            multiply((const uint32_t *)a->query + (int64_t)h * group * half, group, half, part, PAIR_TILE, logits);
            float *out = outs + (int64_t)h * group * dim;
            for (int j = 0; j < group; j++) {
                float *own = logits + j * PAIR_TILE;
                for (int t = 0; t < PAIR_TILE; t++) own[t] *= a->scale;
                for (int t = m; t < PAIR_TILE; t++) own[t] = -__builtin_inff();
                weigh(own, PAIR_TILE, most + h * group + j, sum + h * group + j, out + (int64_t)j * dim, dim);
                for (int t = 0; t < PAIR_TILE; t += 32) {
                    __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(own + t + 16), _mm512_loadu_ps(own + t));
                    _mm512_storeu_si512(weights + (j * PAIR_TILE + t) / 2, (__m512i)both);
                }
            }
            for (int t = 0; t < PAIR_TILE; t += 2) {
                const uint16_t *one = (const uint16_t *)(keys + a->side + (t < m ? t : m - 1) * a->stride);
                const uint16_t *two = (const uint16_t *)(keys + a->side + (t + 1 < m ? t + 1 : m - 1) * a->stride);
                for (int d = 0; d < dim; d++) part[t / 2 * dim + d] = one[d] | (uint32_t)two[d] << 16;
            }
            multiply(weights, group, PAIR_TILE / 2, part, dim, out);
        }
    }
}
#endif
