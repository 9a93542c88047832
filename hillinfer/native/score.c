/* Integer scores of key codes: out[h][g][i] = sum_d query[h][g][d] * code[h][i][d]. */
#include "common.h"

struct score {
    int isa, bits, heads, group, dim, threads;
    const int8_t *codes;  /* head h at codes + h * head_stride; rows of dim * bits / 8 bytes */
    int64_t head_stride;
    const int64_t *positions;  /* n rows, or NULL for rows 0..n-1 */
    int64_t n;
    int32_t *out;  /* (heads * group, out_stride) */
    int64_t out_stride;
    int8_t *query;   /* (heads, padded group, width); for INT4, even channels before odd ones */
    int32_t *excess; /* (heads, padded group): the sum's excess from the offset of unsigned keys */
    int width, half, padded, row;
};

INLINE const int8_t *row_of(const struct score *s, int head, int64_t i) {
    return s->codes + head * s->head_stride + (s->positions ? s->positions[i] : i) * s->row;
}

/* Plain C, the definition. For INT4 codes a query row has its even channels first. */
INLINE void generic_rows(const struct score *s, int head, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
        const int8_t *k = row_of(s, head, i);
        for (int g = 0; g < s->group; g++) {
            const int8_t *q = s->query + ((int64_t)head * s->padded + g) * s->width;
            int32_t sum = 0;
            if (s->bits == 8)
                for (int d = 0; d < s->row; d++) sum += (int32_t)q[d] * k[d];
            else
                for (int d = 0; d < s->row; d++)
                    sum += (int32_t)q[d] * ((int8_t)((uint8_t)k[d] << 4) >> 4) + (int32_t)q[s->half + d] * (k[d] >> 4);
            s->out[((int64_t)head * s->group + g) * s->out_stride + i] = sum;
        }
    }
}

#if defined(__x86_64__)
/* Four keys by four queries. dpbusd takes unsigned keys: flipping the sign bit adds 128 (INT4: 8) to every code, and
 * `excess`, that offset times the query's sum, is subtracted. Query rows are zero-padded: partial loads do no harm. */
AVX512 INLINE __m512i sums4(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

AVX512 INLINE __m512i lanes2(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

AVX512 INLINE void avx512_rows(const struct score *s, int head, int64_t from, int64_t to, const int bits,
                               const int row) {
    const int8_t *base = s->codes + head * s->head_stride, *queries = s->query + (int64_t)head * s->padded * s->width;
    const int64_t *positions = s->positions;  /* locals, so that the compiler need not assume `out` aliases them */
    const int32_t *excess = s->excess + head * s->padded;
    const int padded = s->padded, width = s->width, half = s->half, group = s->group;
    const int64_t bytes = s->n * row;
    const int64_t stride = s->out_stride;
    int32_t *out = s->out + (int64_t)head * s->group * stride;
    const __m512i by_query = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i flip = _mm512_set1_epi8((char)(bits == 8 ? 0x80 : 0x88)), low = _mm512_set1_epi8(15);
    for (int64_t i = from; i < to; i += 4) {
        const int8_t *k[4];
        for (int t = 0; t < 4; t++) {
            int64_t which = i + t < to ? i + t : to - 1;
            k[t] = base + (positions ? positions[which] : which) * row;
        }
        const int inside = !positions && (i + 4) * row + 64 <= bytes;  /* full loads stay within this head's rows */
        const __mmask8 kept = to - i >= 4 ? 15 : (1 << (to - i)) - 1;
        for (int g = 0; g < padded; g += 4) {
            const int8_t *q = queries + g * width;
            __m512i a[4][4];
            for (int t = 0; t < 4; t++)
                for (int j = 0; j < 4; j++) a[t][j] = _mm512_setzero_si512();
            for (int d = 0; d < row; d += 64) {
                __mmask64 there = row - d >= 64 ? ~0ull : (1ull << (row - d)) - 1;
                __m512i first[4], second[4];
                for (int j = 0; j < 4; j++) {
                    first[j] = _mm512_load_si512(q + j * width + d);
                    if (bits == 4) second[j] = _mm512_load_si512(q + j * width + half + d);
                }
                for (int t = 0; t < 4; t++) {
                    __m512i key = ~there && !inside ? _mm512_maskz_loadu_epi8(there, k[t] + d)  /* 4x slower */
                                                    : _mm512_loadu_si512(k[t] + d);
                    key = _mm512_xor_si512(key, flip);
                    __m512i even = bits == 8 ? key : _mm512_and_si512(key, low);
                    for (int j = 0; j < 4; j++) a[t][j] = _mm512_dpbusd_epi32(a[t][j], even, first[j]);
                    if (bits == 4) {
                        __m512i odd = _mm512_and_si512(_mm512_srli_epi16(key, 4), low);
                        for (int j = 0; j < 4; j++) a[t][j] = _mm512_dpbusd_epi32(a[t][j], odd, second[j]);
                    }
                }
            }
            __m512i u[4];
            for (int t = 0; t < 4; t++) u[t] = sums4(a[t][0], a[t][1], a[t][2], a[t][3]);
            __m512i all = lanes2(lanes2(u[0], u[1]), lanes2(u[2], u[3]));  /* lane t: key t's four sums */
            __m128i over = _mm_loadu_si128((const __m128i *)(excess + g));
            all = _mm512_permutexvar_epi32(by_query, _mm512_sub_epi32(all, _mm512_broadcast_i32x4(over)));
            int32_t *at = out + g * stride + i;
            _mm_mask_storeu_epi32(at, kept, _mm512_castsi512_si128(all));
            if (g + 1 < group) _mm_mask_storeu_epi32(at + stride, kept, _mm512_extracti32x4_epi32(all, 1));
            if (g + 2 < group) _mm_mask_storeu_epi32(at + 2 * stride, kept, _mm512_extracti32x4_epi32(all, 2));
            if (g + 3 < group) _mm_mask_storeu_epi32(at + 3 * stride, kept, _mm512_extracti32x4_epi32(all, 3));
        }
    }
}

/* Specialised for common sizes, without a loop over channels. */
AVX512 static void avx512_int8(const struct score *s, int h, int64_t a, int64_t b) {
    if (s->row == 64) avx512_rows(s, h, a, b, 8, 64);
    else if (s->row == 128) avx512_rows(s, h, a, b, 8, 128);
    else avx512_rows(s, h, a, b, 8, s->row);
}

AVX512 static void avx512_int4(const struct score *s, int h, int64_t a, int64_t b) {
    if (s->row == 64) avx512_rows(s, h, a, b, 4, 64);
    else if (s->row == 32) avx512_rows(s, h, a, b, 4, 32);
    else avx512_rows(s, h, a, b, 4, s->row);
}

/* Two keys by four queries. maddubs sums pairs in 16 bits: at most 2 * 127 * 127, so they never saturate. */
AVX2 INLINE void avx2_rows(const struct score *s, int head, int64_t from, int64_t to, const int bits) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x88);
    for (int64_t i = from; i < to; i += 2) {
        const int8_t *k[2] = {row_of(s, head, i), row_of(s, head, i + 1 < to ? i + 1 : i)};
        for (int g = 0; g < s->padded; g += 4) {
            const int8_t *q = s->query + ((int64_t)head * s->padded + g) * s->width;
            __m256i a[2][4];
            for (int t = 0; t < 2; t++)
                for (int j = 0; j < 4; j++) a[t][j] = _mm256_setzero_si256();
            for (int d = 0; d < s->row; d += 32)
                for (int t = 0; t < 2; t++) {
                    int8_t rest[32] = {0};
                    const int8_t *at = k[t] + d;
                    if (s->row - d < 32) at = memcpy(rest, at, s->row - d);
                    __m256i key = _mm256_loadu_si256((const __m256i *)at);
                    __m256i size = _mm256_abs_epi8(key), odd = size;
                    if (bits == 4) {
                        key = _mm256_xor_si256(key, flip);
                        size = _mm256_and_si256(key, low);
                        odd = _mm256_and_si256(_mm256_srli_epi16(key, 4), low);
                    }
                    for (int j = 0; j < 4; j++) {
                        __m256i x = _mm256_loadu_si256((const __m256i *)(q + j * s->width + d));
                        __m256i sum = _mm256_maddubs_epi16(size, bits == 8 ? _mm256_sign_epi8(x, key) : x);
                        if (bits == 4) {
                            __m256i y = _mm256_loadu_si256((const __m256i *)(q + j * s->width + s->half + d));
                            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(odd, y));
                        }
                        a[t][j] = _mm256_add_epi32(a[t][j], _mm256_madd_epi16(sum, ones));
                    }
                }
            __m128i excess = _mm_loadu_si128((const __m128i *)(s->excess + head * s->padded + g));
            for (int t = 0; t < 2 && i + t < to; t++) {
                __m256i ab = _mm256_hadd_epi32(a[t][0], a[t][1]), cd = _mm256_hadd_epi32(a[t][2], a[t][3]);
                __m256i all = _mm256_hadd_epi32(ab, cd);
                __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
                int32_t sums[4];
                _mm_storeu_si128((__m128i *)sums, _mm_sub_epi32(four, excess));
                for (int j = 0; j < 4 && g + j < s->group; j++)
                    s->out[((int64_t)head * s->group + g + j) * s->out_stride + i + t] = sums[j];
            }
        }
    }
}

AVX2 static void avx2_int8(const struct score *s, int h, int64_t a, int64_t b) { avx2_rows(s, h, a, b, 8); }
AVX2 static void avx2_int4(const struct score *s, int h, int64_t a, int64_t b) { avx2_rows(s, h, a, b, 4); }
#elif defined(__aarch64__)
/* One key by all queries, 16 codes at a time: products fit in 16 bits and accumulate in 32. */
static void neon_rows(const struct score *s, int head, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
        const int8_t *k = row_of(s, head, i);
        for (int g = 0; g < s->group; g++) {
            const int8_t *q = s->query + ((int64_t)head * s->padded + g) * s->width;
            int32x4_t sum = vdupq_n_s32(0);
            for (int d = 0; d < s->row; d += 16) {
                int8_t rest[16] = {0};
                const int8_t *at = k + d;
                if (s->row - d < 16) at = memcpy(rest, at, s->row - d);
                int8x16_t key = vld1q_s8(at), x = vld1q_s8(q + d), odd = vshrq_n_s8(key, 4);
                if (s->bits == 4) key = vshrq_n_s8(vshlq_n_s8(key, 4), 4);
                sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(key), vget_low_s8(x)));
                sum = vpadalq_s16(sum, vmull_s8(vget_high_s8(key), vget_high_s8(x)));
                if (s->bits == 8) continue;
                x = vld1q_s8(q + s->half + d);
                sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(odd), vget_low_s8(x)));
                sum = vpadalq_s16(sum, vmull_s8(vget_high_s8(odd), vget_high_s8(x)));
            }
            s->out[((int64_t)head * s->group + g) * s->out_stride + i] = vaddvq_s32(sum);
        }
    }
}
#endif

static void score_share(void *job, int share) {
    const struct score *s = job;
    int64_t from = s->n * share / s->threads, to = s->n * (share + 1) / s->threads;
    for (int head = 0; head < s->heads; head++) {
#if defined(__x86_64__)
        if (s->isa >= ISA_AVX512) {
            (s->bits == 8 ? avx512_int8 : avx512_int4)(s, head, from, to);
            continue;
        }
        if (s->isa == ISA_AVX2) {
            (s->bits == 8 ? avx2_int8 : avx2_int4)(s, head, from, to);
            continue;
        }
#elif defined(__aarch64__)
        if (s->isa == NEON) {
            neon_rows(s, head, from, to);
            continue;
        }
#endif
        generic_rows(s, head, from, to);
    }
}

/* query: int8 (heads, group, dim). codes: `held` rows per head; positions: n of them, or NULL for the first n.
 * Returns 0, NO_MEMORY, or WRONG for a position that is not held. */
int hi_score(int isa, int bits, const int8_t *codes, int64_t head_stride, int64_t held, const int8_t *query, int heads,
             int group, int dim, const int64_t *positions, int64_t n, int32_t *out, int64_t out_stride, int threads) {
    for (int64_t i = 0; positions && i < n; i++)
        if (positions[i] < 0 || positions[i] >= held) return WRONG;
    struct score s = {.isa = isa, .bits = bits, .heads = heads, .group = group, .dim = dim, .threads = threads,
                      .codes = codes, .head_stride = head_stride, .positions = positions, .n = n, .out = out,
                      .out_stride = out_stride};
    s.row = dim * bits / 8;
    s.half = (s.row + 63) / 64 * 64;
    s.width = bits == 8 ? s.half : 2 * s.half;
    s.padded = (group + 3) / 4 * 4;
    s.query = aligned_alloc(64, (size_t)heads * s.padded * s.width);  /* a load that crosses a cache line costs two */
    s.excess = calloc((size_t)heads * s.padded, sizeof(int32_t));
    if (!s.query || !s.excess) {
        free(s.query);
        free(s.excess);
        return NO_MEMORY;
    }
    int32_t offset = bits == 8 ? (isa >= ISA_AVX512 ? 128 : 0) : 8;
    for (int h = 0; h < heads; h++)
        for (int g = 0; g < s.padded; g++) {  /* padding repeats the last query; its sums are not stored */
            const int8_t *from = query + ((int64_t)h * group + (g < group ? g : group - 1)) * dim;
            int8_t *to = s.query + ((int64_t)h * s.padded + g) * s.width;
            int32_t sum = 0;
            memset(to, 0, s.width);
            for (int d = 0; d < dim; d++) {
                to[bits == 8 ? d : d / 2 + d % 2 * s.half] = from[d];
                sum += from[d];
            }
            s.excess[h * s.padded + g] = offset * sum;
        }
    split(score_share, &s, threads);
    free(s.query);
    free(s.excess);
    return 0;
}
