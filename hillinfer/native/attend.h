/* What the kernels of attention share. */
#pragma once
#include "common.h"

#define PAIR_TILE 64  /* tokens whose pairs are multiplied at once */

struct attend {
    int isa, dtype, heads, group, dim, threads, pairs;
    const int64_t *records;  /* addresses (n,), or NULL: base + i * stride */
    const char *base;
    int64_t stride, n, side;  /* side: bytes from a record's keys to its values */
    const float *query;  /* (heads * group, dim), scaled; for `attend_pairs` pairs of bf16, not scaled */
    float scale, cap;  /* logits become cap * tanh(logit / cap); 0 leaves them */
    float *state;  /* per thread: maximum (heads * group), sum (heads * group), weighted values (heads * group, dim), room */
    int64_t each;  /* floats of a thread's state */
};

#ifdef PAIRS
void attend_pairs(const struct attend *a, int share);
#endif

/* exp(x) for x <= 0, to a few ulp, in a form that compilers vectorise. */
INLINE float exp_below(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { uint32_t u; float f; } scale = {(uint32_t)((int32_t)n + 127) << 23};
    return p * scale.f;
}

/* One query's logits of a tile become weights. Its maximum rises to theirs, which rescales its sum and values so far. */
INLINE void weigh(float *logits, int tile, float *most, float *sum, float *out, int dim) {
    float high = *most, part = 0;
#pragma omp simd reduction(max : high)
    for (int t = 0; t < tile; t++) high = logits[t] > high ? logits[t] : high;
    if (high > *most) {
        float keep = exp_below(*most - high);
        if (*sum > 0)
            for (int d = 0; d < dim; d++) out[d] *= keep;
        *sum *= keep;
        *most = high;
    }
#pragma omp simd reduction(+ : part)
    for (int t = 0; t < tile; t++) {
        logits[t] = exp_below(logits[t] - high);
        part += logits[t];
    }
    *sum += part;
}
