/* Quantises keys at append, bit-identical to `KeyCodes` in torch: every step is one IEEE operation. */
#include <math.h>
#include "common.h"

INLINE float key_at(const void *keys, int64_t i, int dtype) {
    if (dtype == FP32) return ((const float *)keys)[i];
    union { uint32_t u; float f; } x = {(uint32_t)((const uint16_t *)keys)[i] << 16};
    return x.f;
}

#define EVEN 12582912.0f  /* added and taken away again it rounds as rintf does, ties to even, without a call */

INLINE int8_t code_of(const uint8_t *row, int d, int bits) {
    return bits == 8 ? (int8_t)row[d] : d % 2 ? (int8_t)row[d / 2] >> 4 : (int8_t)(uint8_t)(row[d / 2] << 4) >> 4;
}

INLINE void set_code(uint8_t *row, int d, int bits, int8_t code) {
    if (bits == 8) row[d] = (uint8_t)code;
    else if (d % 2) row[d / 2] = (uint8_t)((row[d / 2] & 15) | (uint8_t)code << 4);
    else row[d / 2] = (uint8_t)((row[d / 2] & 0xf0) | ((uint8_t)code & 15));
}

/* One head: keys (n, dim), `row` elements apart, after `at` tokens already in codes. The first keys fix the zero point,
 * the middle of a channel's range. Returns whether any channel's scale doubled; its older codes are halved as often. */
INLINE int encode_head(const void *keys, int dtype, int64_t row, int64_t n, int dim, int bits, float *restrict scale,
                       float *restrict zero, uint8_t *restrict codes, int64_t at, uint8_t *doublings,
                       float *restrict need) {
    const float top = bits == 8 ? 127 : 7, tiny = 1.17549435e-38f;
    const int width = dim * bits / 8;
    int any = 0;
    for (int d = 0; at == 0 && n && d < dim; d++) zero[d] = need[d] = key_at(keys, d, dtype);
    for (int64_t i = 1; at == 0 && i < n; i++)
        for (int d = 0; d < dim; d++) {
            float key = key_at(keys, i * row + d, dtype);
            zero[d] = key < zero[d] ? key : zero[d];
            need[d] = key > need[d] ? key : need[d];
        }
    for (int d = 0; d < dim; d++) {  /* rounding is monotonic: the key farthest from zero is the lowest or highest */
        float low = zero[d], high = need[d];
        need[d] = 0;
        if (at || !n) continue;
        zero[d] = (low + high) / 2;
        low = fabsf(low - zero[d]), high = fabsf(high - zero[d]);
        need[d] = low > high ? low : high;
    }
    for (int64_t i = 0; at && i < n; i++)
        for (int d = 0; d < dim; d++) {
            float size = fabsf(key_at(keys, i * row + d, dtype) - zero[d]);
            need[d] = size > need[d] ? size : need[d];
        }
    for (int d = 0; d < dim; d++) {
        need[d] /= top;
        doublings[d] = 0;
        if (scale[d] == 0) {
            scale[d] = need[d];
        } else if (need[d] > scale[d]) {
            int exponent;
            float mantissa = frexpf(need[d] / scale[d], &exponent);
            int times = mantissa > 0.5f ? exponent : exponent - 1;  /* exact ceil(log2) */
            doublings[d] = (uint8_t)(times < 0 ? 0 : times);
            scale[d] = ldexpf(scale[d], doublings[d]);
            any |= doublings[d];
        }
        need[d] = scale[d] < tiny ? tiny : scale[d];
    }
    for (int d = 0; any && d < dim; d++)
        for (int64_t i = 0; doublings[d] && i < at; i++) {
            uint8_t *old = codes + i * width;
            set_code(old, d, bits, (int8_t)rintf(ldexpf(code_of(old, d, bits), -doublings[d])));
        }
    for (int64_t i = 0; i < n; i++) {
        uint8_t *to = codes + (at + i) * width;
        for (int d = 0; d < dim; d++) {
            float code = (key_at(keys, i * row + d, dtype) - zero[d]) / need[d];
            code = code > top ? top : code < -top ? -top : code;
            set_code(to, d, bits, (int8_t)(int)((code + EVEN) - EVEN));
        }
    }
    return any != 0;
}

/* keys: (batch, heads, n, dim), strides in elements. scale, zero, doublings: (batch, heads, dim). codes: strides in
 * bytes. */
int hi_encode(int dtype, const char *keys, int64_t by_row, int64_t by_head, int64_t by_token, int batch, int heads,
              int64_t n, int dim, int bits, float *scale, float *zero, uint8_t *codes, int64_t codes_by_row,
              int64_t codes_by_head, int64_t at, uint8_t *doublings) {
    float need[MAX_CODED];
    int any = 0, size = dtype == FP32 ? 4 : 2;
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++) {
            int64_t which = (int64_t)(b * heads + h) * dim;
            const char *from = keys + (b * by_row + h * by_head) * size;
            uint8_t *to = codes + b * codes_by_row + h * codes_by_head;
#define ENCODE(type, width) encode_head(from, type, by_token, n, dim, width, scale + which, zero + which, to, at, \
                                        doublings + which, need)
            any |= bits != 8 ? ENCODE(dtype, bits) : dtype == FP32 ? ENCODE(FP32, 8) : ENCODE(BF16, 8);
        }
    return any;
}

/* Folds the channel scales (heads, dim) into a query fp32 (heads, group, dim) and quantises it to INT8 with one step
 * size per group. */
void hi_query(const float *query, const float *scale, int heads, int group, int dim, int8_t *out, float *unit) {
    const float tiny = 1.17549435e-38f;
    for (int h = 0; h < heads; h++) {
        const float *q = query + (int64_t)h * group * dim, *s = scale + (int64_t)h * dim;
        int8_t *to = out + (int64_t)h * group * dim;
        float most = 0;
        for (int g = 0; g < group; g++)
            for (int d = 0; d < dim; d++) {
                float size = fabsf(q[g * dim + d] * s[d]);
                most = size > most ? size : most;
            }
        float step = most / 127;
        step = step < tiny ? tiny : step;
        unit[h] = step;
        for (int g = 0; g < group; g++)
            for (int d = 0; d < dim; d++) {
                float code = rintf(q[g * dim + d] * s[d] / step);
                to[g * dim + d] = (int8_t)(code > 127 ? 127 : code < -127 ? -127 : code);
            }
    }
}
