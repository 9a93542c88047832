/* CRC-32 of blocks, to the bit zlib.crc32. With carry-less multiplication four 128-bit lanes are folded along a block
 * (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009; constants of its zlib
 * polynomial), and a table takes the last 16 bytes; without it the table takes all, eight bytes at a time. */
#include "common.h"

enum { BLOCK = 4096 };
static uint32_t table[8][256];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
        table[0][i] = value;
    }
    for (int i = 0; i < 256; i++)
        for (int t = 1; t < 8; t++) table[t][i] = table[t - 1][i] >> 8 ^ table[0][table[t - 1][i] & 255];
}

/* n is a multiple of 8. */
static uint32_t by_table(uint32_t state, const uint8_t *from, int64_t n) {
    for (int64_t at = 0; at < n; at += 8) {
        uint32_t low, high;
        memcpy(&low, from + at, 4);
        memcpy(&high, from + at + 4, 4);
        low ^= state;
        state = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
                table[3][high & 255] ^ table[2][high >> 8 & 255] ^ table[1][high >> 16 & 255] ^ table[0][high >> 24];
    }
    return state;
}

static uint32_t crc_generic(const uint8_t *from) { return ~by_table(~0u, from, BLOCK); }

#if defined(__x86_64__)
#define CLMUL __attribute__((target("pclmul,sse4.1")))
CLMUL INLINE __m128i fold(__m128i lane, __m128i by, __m128i next) {
    __m128i low = _mm_clmulepi64_si128(lane, by, 0x00), high = _mm_clmulepi64_si128(lane, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

CLMUL static uint32_t crc_clmul(const uint8_t *from) {
    const __m128i *at = (const __m128i *)from, *end = (const __m128i *)(from + BLOCK);
    const __m128i far = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), near = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    __m128i lanes[4];
    for (int i = 0; i < 4; i++) lanes[i] = _mm_loadu_si128(at + i);
    lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(-1));
    for (at += 4; at < end; at += 4)
        for (int i = 0; i < 4; i++) lanes[i] = fold(lanes[i], far, _mm_loadu_si128(at + i));
    for (int i = 1; i < 4; i++) lanes[i] = fold(lanes[i - 1], near, lanes[i]);
    uint8_t rest[16];
    _mm_storeu_si128((__m128i *)rest, lanes[3]);
    return ~by_table(0, rest, 16);
}
#endif

/* n pieces of whole blocks, at addresses in memory and offsets of the file, against sums[offset / 4096]. With `write`
 * they are noted there; else compared. Returns the offset of the first block that differs, or -1. 0 stands for a block
 * that was never written, which is not compared; a sum of 0 is noted as 1. */
int64_t hi_checksums(int isa, int write, int64_t n, const int64_t *offsets, const int64_t *addresses,
                     const int64_t *lengths, uint32_t *sums) {
    uint32_t (*crc)(const uint8_t *) = crc_generic;
#if defined(__x86_64__)
    if (isa != GENERIC && __builtin_cpu_supports("pclmul")) crc = crc_clmul;
#endif
    (void)isa;
    pthread_once(&once, fill);
    for (int64_t i = 0; i < n; i++)
        for (int64_t at = 0; at < lengths[i]; at += BLOCK) {
            uint32_t *noted = sums + (offsets[i] + at) / BLOCK;
            if (!write && !*noted) continue;
            uint32_t sum = crc((const uint8_t *)addresses[i] + at);
            sum += !sum;
            if (write) *noted = sum;
            else if (*noted != sum) return offsets[i] + at;
        }
    return -1;
}
