/* Scores of 2-bit codes in segments of tokens, in units of INT8 codes (`evaluator.segments`). Sixteen keys are a block of
 * words, the first of channels 0 to 15: byte j of a key's word holds channels j, 4 + j, 8 + j and 12 + j, from the low
 * bits up. So a lane's sum is one key's, and four channels of a query are one broadcast. */
#include "common.h"

#define KEYS 16  /* of a block */
#define TILE 4   /* blocks and queries of a tile */
#define SPAN (TILE * KEYS)

struct scan {
    int isa, heads, group, dim, words, threads;
    const uint32_t *codes;  /* head h at codes + h * codes_by_head; blocks of (words, KEYS) */
    const int8_t *ranges;   /* head h at ranges + h * ranges_by_head; (segments, 2, dim): lowest, highest INT8 code */
    int64_t codes_by_head, ranges_by_head, segments, tokens;
    const int8_t *query;  /* (heads * group, dim) */
    int32_t *out;  /* (heads * group, out_stride) */
    int64_t out_stride;
};

struct tile { int8_t query[TILE][MAX_CODED] __attribute__((aligned(64))); int32_t shift[TILE], *out[TILE]; };

/* A segment's query, and the score of code 0 in all channels. */
INLINE int32_t fold(const int8_t *query, const int8_t *low, const int8_t *high, int dim, int8_t *out) {
    int32_t sum = 0;
    for (int d = 0; d < dim; d++) {
        int16_t span = high[d] - low[d] + 1, middle = 8 * low[d] + span - 4;  /* of code 0, in eighths */
        out[d] = (int8_t)((int16_t)(query[d] * span + 128) >> 8);
        sum += query[d] * middle;
    }
    return (sum + 4) >> 3;
}

/* The definition. */
INLINE void tile_generic(const uint32_t *codes, struct tile *t, int words) {
    for (int g = 0; g < TILE; g++)
        for (int k = 0; k < SPAN; k++) {
            const uint32_t *key = codes + k / KEYS * words * KEYS + k % KEYS;
            int32_t sum = 0;
            for (int d = 0; d < 16 * words; d++)
                sum += t->query[g][d] * (int32_t)(key[d / 16 * KEYS] >> (d % 4 * 8 + d % 16 / 4 * 2) & 3);
            t->out[g][k] = 64 * sum + t->shift[g];
        }
}

#if defined(__x86_64__)
INLINE int32_t four(const struct tile *t, int g, int at) { return ((const int32_t *)t->query[g])[at]; }

/* Two blocks at a time: eight sums stay in registers, sixteen do not. */
AVX512 INLINE void tile_avx512(const uint32_t *codes, struct tile *t, int words) {
    const __m512i low = _mm512_set1_epi8(3);
    for (int b = 0; b < TILE; b += 2) {
        const uint32_t *block = codes + b * words * KEYS;
        __m512i sum[2][TILE], key[2];
        for (int i = 0; i < 2; i++)
            for (int g = 0; g < TILE; g++) sum[i][g] = _mm512_setzero_si512();
        for (int w = 0; w < words; w++) {
            for (int i = 0; i < 2; i++) {
                const uint32_t *at = block + (i * words + w) * KEYS;
                __builtin_prefetch(at + 2 * TILE * words * KEYS);
                key[i] = _mm512_loadu_si512(at);
            }
            for (int p = 0; p < 4; p++)
                for (int i = 0; i < 2; i++) {
                    __m512i part = _mm512_and_si512(p ? _mm512_srli_epi16(key[i], 2 * p) : key[i], low);
                    for (int g = 0; g < TILE; g++) {
                        __m512i query = _mm512_set1_epi32(four(t, g, 4 * w + p));
                        sum[i][g] = _mm512_dpbusd_epi32(sum[i][g], part, query);
                    }
                }
        }
        for (int i = 0; i < 2; i++)
            for (int g = 0; g < TILE; g++) {
                __m512i all = _mm512_add_epi32(_mm512_slli_epi32(sum[i][g], 6), _mm512_set1_epi32(t->shift[g]));
                _mm512_storeu_si512(t->out[g] + (b + i) * KEYS, all);
            }
    }
}

/* A product of two channels fits in 16 bits, and so do the sums of four. */
AVX2 INLINE void tile_avx2(const uint32_t *codes, struct tile *t, int words) {
    const __m256i low = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    for (int b = 0; b < 2 * TILE; b++) {
        const uint32_t *half = codes + b / 2 * words * KEYS + b % 2 * 8;
        __m256i sum[TILE] = {0};
        for (int w = 0; w < words; w++) {
            __m256i key = _mm256_loadu_si256((const __m256i *)(half + w * KEYS)), pairs[TILE] = {0};
            for (int p = 0; p < 4; p++, key = _mm256_srli_epi16(key, 2))
                for (int g = 0; g < TILE; g++) {
                    __m256i query = _mm256_set1_epi32(four(t, g, 4 * w + p));
                    pairs[g] = _mm256_add_epi16(pairs[g], _mm256_maddubs_epi16(_mm256_and_si256(key, low), query));
                }
            for (int g = 0; g < TILE; g++) sum[g] = _mm256_add_epi32(sum[g], _mm256_madd_epi16(pairs[g], ones));
        }
        for (int g = 0; g < TILE; g++) {
            __m256i all = _mm256_add_epi32(_mm256_slli_epi32(sum[g], 6), _mm256_set1_epi32(t->shift[g]));
            _mm256_storeu_si256((__m256i *)(t->out[g] + b * 8), all);
        }
    }
}
#endif

INLINE void scan_segments(const struct scan *s, int share, void (*score)(const uint32_t *, struct tile *, int)) {
    struct tile t = {0};
    const int64_t first = s->segments * share / s->threads, last = s->segments * (share + 1) / s->threads;
    for (int h = 0; h < s->heads; h++)
        for (int64_t at = first; at < last; at++)
            for (int g = 0; g < s->group; g += TILE) {
                const int8_t *low = s->ranges + h * s->ranges_by_head + 2 * at * s->dim;
                for (int j = 0; j < TILE; j++) {  /* beyond a group its last query is repeated */
                    const int64_t head = h * s->group + (g + j < s->group ? g + j : s->group - 1);
                    t.shift[j] = fold(s->query + head * s->dim, low, low + s->dim, s->dim, t.query[j]);
                    t.out[j] = s->out + head * s->out_stride + at * s->tokens;
                }
                const uint32_t *codes = s->codes + h * s->codes_by_head + at * s->tokens * s->words;
                for (int64_t n = 0; n < s->tokens; n += SPAN, codes += SPAN * s->words) {
                    score(codes, &t, s->words);
                    for (int j = 0; j < TILE; j++) t.out[j] += SPAN;
                }
            }
}

#if defined(__x86_64__)
AVX512 static void scan_avx512(const struct scan *s, int share) { scan_segments(s, share, tile_avx512); }
AVX2 static void scan_avx2(const struct scan *s, int share) { scan_segments(s, share, tile_avx2); }
#endif

static void scan_share(void *job, int share) {
    const struct scan *s = job;
#if defined(__x86_64__)
    if (s->isa >= ISA_AVX512) return scan_avx512(s, share);
    if (s->isa == ISA_AVX2) return scan_avx2(s, share);
#endif
    scan_segments(s, share, tile_generic);
}

/* Strides in elements, of 32 and 8 bits. `tokens` of a segment are a multiple of 64. */
void hi_scan(int isa, const void *codes, int64_t codes_by_head, const int8_t *ranges, int64_t ranges_by_head,
             int64_t segments, int64_t tokens, const int8_t *query, int heads, int group, int dim, int32_t *out,
             int64_t out_stride, int threads) {
    struct scan s = {isa, heads, group, dim, (dim + 15) / 16, threads, codes, ranges, codes_by_head, ranges_by_head,
                     segments, tokens, query, out, out_stride};
    split(scan_share, &s, threads);
}
