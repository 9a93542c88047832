/* CRC-32 of blocks, bit-identical to zlib.crc32. Carry-less multiplication folds four 128-bit lanes along a block
 * (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009; constants for the zlib
 * polynomial), and a table finishes the last 16 bytes. The fallback is the table alone, eight bytes at a time. */
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

/* n: a multiple of 8 */
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

/* n of all three: a multiple of 64, and not 0 */
static uint32_t crc_generic(const uint8_t *from, int64_t n) { return ~by_table(~0u, from, n); }

#if defined(__x86_64__)
#define FAR 0x01c6e41596, 0x0154442bd4
#define CLMUL __attribute__((target("pclmul,sse4.1")))
CLMUL INLINE __m128i fold(__m128i lane, __m128i by, __m128i next) {
    __m128i low = _mm_clmulepi64_si128(lane, by, 0x00), high = _mm_clmulepi64_si128(lane, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* Reduces four lanes, folded over all bytes, to the checksum. */
CLMUL INLINE uint32_t finish(const __m128i *lanes) {
    const __m128i near = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    __m128i last = lanes[0];
    for (int i = 1; i < 4; i++) last = fold(last, near, lanes[i]);
    uint8_t rest[16];
    _mm_storeu_si128((__m128i *)rest, last);
    return ~by_table(0, rest, 16);
}

CLMUL static uint32_t crc_clmul(const uint8_t *from, int64_t n) {
    const __m128i *at = (const __m128i *)from, *end = (const __m128i *)(from + n), far = _mm_set_epi64x(FAR);
    __m128i lanes[4];
    for (int i = 0; i < 4; i++) lanes[i] = _mm_loadu_si128(at + i);
    lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(-1));
    for (at += 4; at < end; at += 4)
        for (int i = 0; i < 4; i++) lanes[i] = fold(lanes[i], far, _mm_loadu_si128(at + i));
    return finish(lanes);
}

/* The same with all four lanes in one register. */
__attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.1"))) static uint32_t crc_wide(const uint8_t *from, int64_t n) {
    const __m512i far = _mm512_broadcast_i32x4(_mm_set_epi64x(FAR));
    __m512i lanes = _mm512_xor_si512(_mm512_loadu_si512(from), _mm512_zextsi128_si512(_mm_cvtsi32_si128(-1)));
    for (int64_t at = 64; at < n; at += 64) {
        __m512i low = _mm512_clmulepi64_epi128(lanes, far, 0x00), high = _mm512_clmulepi64_epi128(lanes, far, 0x11);
        lanes = _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(from + at), 0x96);
    }
    __m128i apart[4];
    _mm512_storeu_si512(apart, lanes);
    return finish(apart);
}
#endif

static uint32_t (*ready(int isa))(const uint8_t *, int64_t) {
    pthread_once(&once, fill);
    (void)isa;
#if defined(__x86_64__)
    if (isa >= ISA_AVX512 && __builtin_cpu_supports("vpclmulqdq")) return crc_wide;
    if (isa != GENERIC && __builtin_cpu_supports("pclmul")) return crc_clmul;
#endif
    return crc_generic;
}

/* Of n bytes, a multiple of 64 and not 0. */
uint32_t hi_crc(int isa, const uint8_t *from, int64_t n) { return ready(isa)(from, n); }

/* The first of n pieces that cannot be moved, or -1: offsets in [0, end) and lengths in [least, most] are multiples of
 * `unit` bytes, and no piece ends beyond `end` or lies at null. */
int64_t hi_pieces(int64_t n, const int64_t *offsets, const int64_t *addresses, const int64_t *lengths, int64_t unit,
                  int64_t least, int64_t most, int64_t end) {
    for (int64_t i = 0; i < n; i++) {
        int64_t offset = offsets[i], length = lengths[i];
        if (offset < 0 || offset > end || length < least || length > most || length > end - offset || offset % unit ||
            length % unit || (length && !addresses[i]))
            return i;
    }
    return -1;
}

/* Checksums of n pieces of whole blocks, at addresses in memory and offsets in the file: stored in sums[offset / 4096]
 * with `write`, otherwise compared. Returns the offset of the first block that differs, or -1. 0 marks a block never
 * written, which is not compared; a checksum of 0 is stored as 1. */
int64_t hi_checksums(int isa, int write, int64_t n, const int64_t *offsets, const int64_t *addresses,
                     const int64_t *lengths, uint32_t *sums) {
    uint32_t (*crc)(const uint8_t *, int64_t) = ready(isa);
    for (int64_t i = 0; i < n; i++)
        for (int64_t at = 0; at < lengths[i]; at += BLOCK) {
            uint32_t *noted = sums + (offsets[i] + at) / BLOCK;
            if (!write && !*noted) continue;
            uint32_t sum = crc((const uint8_t *)addresses[i] + at, BLOCK);
            sum += !sum;
            if (write) *noted = sum;
            else if (*noted != sum) return offsets[i] + at;
        }
    return -1;
}
