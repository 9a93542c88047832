/* Attention of one query token over scattered records: softmax(q.k * scale).v without a gather buffer.
 * A record is K (heads, dim) followed by V (heads, dim). Online softmax over tiles of tokens (Milakov and Gimelshein,
 * arXiv 1805.02867) reads each record once. Accumulation is in fp32 for every record type. */
#include "attend.h"

#define TILE 32

INLINE const char *record_of(const struct attend *a, int64_t i) {
    return a->records ? (const char *)a->records[i] : a->base + i * a->stride;
}

INLINE float half_to_float(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    union { uint32_t u; float f; } x, magic = {113u << 23};
    x.u = rest << 13;
    if (rest >= 0x7c00) x.u += (255 - 31 + 0u) << 23;
    else if (rest >= 0x400) x.u += (127 - 15) << 23;
    else { x.u += 113u << 23; x.f -= magic.f; }  /* subnormal */
    x.u |= sign;
    return x.f;
}

/* One head's row as fp32, in place or converted into `room`. */
INLINE const float *row_generic(const char *from, float *room, int dim, int dtype) {
    if (dtype == FP32) return (const float *)from;
    const uint16_t *bits = (const uint16_t *)from;
    if (dtype == BF16) {
        for (int d = 0; d < dim; d++) {
            union { uint32_t u; float f; } x = {(uint32_t)bits[d] << 16};
            room[d] = x.f;
        }
        return room;
    }
    int d = 0;
#if defined(__aarch64__)
    for (; d + 4 <= dim; d += 4) vst1q_f32(room + d, vcvt_f32_f16(vld1_f16((const __fp16 *)bits + d)));
#endif
    for (; d < dim; d++) room[d] = half_to_float(bits[d]);
    return room;
}

INLINE void prefetch(const char *at, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b);
}

typedef const float *convert(const char *from, float *room, int dim, int dtype);

INLINE void tiles(const struct attend *a, int share, const int dtype, const int dim, convert *row_fp32) {
    const int heads = a->heads, group = a->group, all = heads * group;
    const int64_t row = (int64_t)dim * (dtype == FP32 ? 4 : 2), keys = row * heads, side = a->side;
    const int64_t end = a->n * (share + 1) / a->threads;
    float *most = a->state + share * a->each, *sum = most + all, *out = sum + all;
    float *logits = out + (int64_t)all * dim;  /* (all, TILE) */
    float room[4][MAX_DIM];
    for (int j = 0; j < all; j++) most[j] = -__builtin_inff();
    memset(sum, 0, sizeof(float) * all * (dim + 1));
    for (int64_t at = a->n * share / a->threads; at < end; at += TILE) {
        const int m = end - at < TILE ? (int)(end - at) : TILE;
        const char *records[TILE];
        for (int t = 0; t < m; t++) records[t] = record_of(a, at + t);
        for (int t = 0; t < m; t++) {
            if (at + t + 4 < end) prefetch(record_of(a, at + t + 4), keys);
            prefetch(records[t] + side, keys);
            for (int h = 0; h < heads; h++) {
                const float *k = row_fp32(records[t] + h * row, room[0], dim, dtype);
                const float *q = a->query + (int64_t)h * group * dim;
                float *to = logits + (int64_t)h * group * TILE + t;
                int g = 0;
                for (; g + 4 <= group; g += 4, q += 4 * dim, to += 4 * TILE) {
                    float w = 0, x = 0, y = 0, z = 0;
#pragma omp simd reduction(+ : w, x, y, z)
                    for (int d = 0; d < dim; d++) {
                        w += k[d] * q[d];
                        x += k[d] * q[dim + d];
                        y += k[d] * q[2 * dim + d];
                        z += k[d] * q[3 * dim + d];
                    }
                    to[0] = w, to[TILE] = x, to[2 * TILE] = y, to[3 * TILE] = z;
                }
                if (g + 2 <= group) {
                    float w = 0, x = 0;
#pragma omp simd reduction(+ : w, x)
                    for (int d = 0; d < dim; d++) {
                        w += k[d] * q[d];
                        x += k[d] * q[dim + d];
                    }
                    to[0] = w, to[TILE] = x;
                    g += 2, q += 2 * dim, to += 2 * TILE;
                }
                if (g < group) {
                    float w = 0;
#pragma omp simd reduction(+ : w)
                    for (int d = 0; d < dim; d++) w += k[d] * q[d];
                    to[0] = w;
                }
            }
        }
        for (int j = 0; j < all; j++) {
            float *own = logits + (int64_t)j * TILE;
            for (int t = 0; t < m && a->cap > 0; t++) own[t] = a->cap * tanhf(own[t] / a->cap);
            for (int t = m; t < TILE; t++) own[t] = -__builtin_inff();  /* zero weight */
            weigh(own, TILE, most + j, sum + j, out + (int64_t)j * dim, dim);
        }
        for (int t = 0; t < m; t += 4)
            for (int h = 0; h < heads; h++) {
                const float *v[4];
                for (int i = 0; i < 4; i++)  /* past the tile's end, the last record again with zero weight */
                    v[i] = row_fp32(records[t + i < m ? t + i : m - 1] + side + h * row, room[i], dim, dtype);
                for (int g = 0; g < group; g++) {
                    const float *p = logits + (int64_t)(h * group + g) * TILE + t;
                    const float w = p[0], x = p[1], y = p[2], z = p[3];
                    float *o = out + (int64_t)(h * group + g) * dim;
#pragma omp simd
                    for (int d = 0; d < dim; d++) o[d] += w * v[0][d] + x * v[1][d] + y * v[2][d] + z * v[3][d];
                }
            }
    }
}

/* Specialised for common sizes, so that loops unroll. */
INLINE void tiles_of(const struct attend *a, int share, convert *row_fp32) {
    if (a->dtype == FP32 && a->dim == 64) tiles(a, share, FP32, 64, row_fp32);
    else if (a->dtype == FP32 && a->dim == 128) tiles(a, share, FP32, 128, row_fp32);
    else if (a->dim == 64) tiles(a, share, a->dtype, 64, row_fp32);
    else if (a->dim == 128) tiles(a, share, a->dtype, 128, row_fp32);
    else tiles(a, share, a->dtype, a->dim, row_fp32);
}

static void tiles_generic(const struct attend *a, int share) { tiles_of(a, share, row_generic); }

#if defined(__x86_64__)
AVX2 static const float *row_avx2(const char *from, float *room, int dim, int dtype) {
    if (dtype != FP16) return row_generic(from, room, dim, dtype);
    int d = 0;
    for (; d + 8 <= dim; d += 8)
        _mm256_storeu_ps(room + d, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * d))));
    for (; d < dim; d++) room[d] = half_to_float(((const uint16_t *)from)[d]);
    return room;
}

AVX512 static const float *row_avx512(const char *from, float *room, int dim, int dtype) {
    if (dtype == FP32) return (const float *)from;
    int d = 0;
    for (; d + 16 <= dim; d += 16) {
        __m256i half = _mm256_loadu_si256((const __m256i *)(from + 2 * d));
        __m512 full = dtype == FP16 ? _mm512_cvtph_ps(half)
                                    : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        _mm512_storeu_ps(room + d, full);
    }
    if (d < dim) row_avx2(from + 2 * d, room + d, dim - d, dtype);
    return room;
}

AVX2 static void tiles_avx2(const struct attend *a, int share) { tiles_of(a, share, row_avx2); }
AVX512 static void tiles_avx512(const struct attend *a, int share) { tiles_of(a, share, row_avx512); }
#endif

static void attend_share(void *job, int share) {
    const struct attend *a = job;
#ifdef PAIRS
    if (a->pairs) { attend_pairs(a, share); return; }
#endif
#if defined(__x86_64__)
    if (a->isa >= ISA_AVX512) { tiles_avx512(a, share); return; }
    if (a->isa == ISA_AVX2) { tiles_avx2(a, share); return; }
#endif
    tiles_generic(a, share);
}

/* query and out: fp32 (heads * group, dim). lse: fp32 (heads * group), the logsumexp of the logits, which merges parts
 * attended to separately. Without records, out is 0 and lse is minus infinity. dim <= MAX_DIM.
 * pairs: for many queries, whose values are bf16's, over records in a row: products of pairs where the machine has them.
 * Returns 0, NO_MEMORY, or WRONG for an address that is null or not a multiple of an element's size. */
int hi_attend(int isa, int dtype, const int64_t *records, const char *base, int64_t stride, int64_t n, int64_t side,
              const float *query, int heads, int group, int dim, float scale, float cap, float *out, float *lse,
              int threads, int pairs) {
    const int all = heads * group, size = dtype == FP32 ? 4 : 2;
    const int64_t one = (int64_t)(uintptr_t)base;
    if (n < 0 || (stride | side) % size || (n && !usable(records ? records : &one, records ? n : 1, size))) return WRONG;
    struct attend a = {isa,  dtype,  heads, group, dim,           threads,   0, records,
                       base, stride, n,     side,  .scale = scale, .cap = cap};
    a.pairs = pairs && isa == ISA_BF16 && dtype == BF16 && !records && dim % PAIR_TILE == 0 && cap == 0 &&
              (one | stride | side) % 4 == 0;
    a.each = (int64_t)all * (dim + 2);
    a.each += a.pairs ? PAIR_TILE * (int64_t)(dim + 2 * group) : (int64_t)all * TILE;
    float *own = malloc(sizeof(float) * (all * (int64_t)dim + threads * a.each));
    if (!own) return NO_MEMORY;
    a.query = own, a.state = own + (int64_t)all * dim;
    for (int64_t i = 0; i < (int64_t)all * dim; i++) {
        if (a.pairs) ((uint16_t *)own)[i] = ((const uint16_t *)query)[2 * i + 1];  /* the upper half of a float */
        else own[i] = query[i] * scale;
    }
    split(attend_share, &a, threads);
    for (int j = 0; j < all; j++) {
        float most = -__builtin_inff(), sum = 0;
        for (int t = 0; t < threads; t++) {
            float m = a.state[t * a.each + j];
            most = m > most ? m : most;
        }
        memset(out + (int64_t)j * dim, 0, sizeof(float) * dim);
        for (int t = 0; t < threads; t++) {
            float *part = a.state + t * a.each;
            if (part[all + j] == 0) continue;
            float weight = exp_below(part[j] - most);
            sum += weight * part[all + j];
            for (int d = 0; d < dim; d++) out[(int64_t)j * dim + d] += weight * part[2 * all + (int64_t)j * dim + d];
        }
        lse[j] = most + logf(sum);
        for (int d = 0; d < dim && sum > 0; d++) out[(int64_t)j * dim + d] /= sum;
    }
    free(own);
    return 0;
}
