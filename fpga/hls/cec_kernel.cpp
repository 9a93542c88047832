// The kernel of ../rtl in HLS C++, for groups that work in HLS: the same arguments, memory image and answer, except that
// the header's cycle count is 0. Its function is tested against the RTL and the package (make -C fpga hls-csim).
// The pragmas are NOT SYNTHESISED BY US: no Vitis HLS was at hand, so nothing is known of its speed and area.
//
// Never compile the C simulation with -march=native: GCC 12 at -O2 vectorises int8 products wrongly on some CPUs.
#include <cstdint>

#ifndef KW
#define KW 8             // bits of a code
#endif
#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef G
#define G 4              // query heads of a KV head
#endif
#ifndef LANES
#define LANES 64         // bytes of the memory port
#endif
#ifndef NMAX
#define NMAX 131072
#endif

constexpr int TOKEN = HEAD_DIM * KW / 8;                       // bytes
constexpr int SW = KW + 7 + (HEAD_DIM == 64 ? 6 : 7);          // bits of a score
constexpr int LOW = SW - 11;                                   // bits below the first histogram's
enum { CAPACITY = 1, ALIGN = 2, BAD_ARGUMENT = 4, QUERY_RANGE = 32 };

static int code(const uint8_t *token, int e) {
    if (KW == 8) return (int8_t)token[e];
    int nibble = token[e / 2] >> (e % 2 * 4) & 15;
    return nibble < 8 ? nibble : nibble - 16;
}

static uint32_t best(const uint8_t *token, const int8_t query[G][HEAD_DIM]) {  // as an unsigned key
    int most = INT32_MIN;
    for (int g = 0; g < G; g++) {
#pragma HLS UNROLL
        int sum = 0;
        for (int e = 0; e < HEAD_DIM; e++) {
#pragma HLS UNROLL
            sum += query[g][e] * code(token, e);
        }
        most = sum > most ? sum : most;
    }
    return most + (1 << (SW - 1));
}

// The bin of `counts` in which the want-th highest lies; want becomes its rank in there.
static int walk(uint32_t *counts, int bins, uint32_t &want) {
    uint32_t above = 0;
    for (int bin = bins - 1; bin >= 0; bin--) {
#pragma HLS PIPELINE II=1
        if (above + counts[bin] >= want) {
            want -= above;
            return bin;
        }
        above += counts[bin];
    }
    return 0;
}

extern "C" void cec_kernel(const uint8_t *keys, const int8_t *query, uint32_t *out, int first, int n_tokens, int k,
                           int heads, int mode, int key_stride, int out_stride) {
#pragma HLS INTERFACE m_axi port=keys bundle=gmem
#pragma HLS INTERFACE m_axi port=query bundle=gmem
#pragma HLS INTERFACE m_axi port=out bundle=gmem
    static uint32_t scores[NMAX];
#pragma HLS BIND_STORAGE variable=scores type=ram_2p impl=uram
    static uint32_t high[1 << 11], low[1 << LOW];
    uint32_t n = n_tokens, wanted = (uint32_t)k < n ? k : n, status = 0;
    if (n > NMAX) status |= CAPACITY;
    if (((uintptr_t)keys | (uintptr_t)query | (uint32_t)key_stride | (uint32_t)first * TOKEN) % LANES) status |= ALIGN;
    if (((uintptr_t)out | (uint32_t)out_stride) % 64) return;
    if ((uint32_t)(heads - 1) >= 0xffff || (uint32_t)mode > 2) status |= BAD_ARGUMENT;
    if (status) heads = 1, n = wanted = 0;
    if (mode == 2) wanted = n;

    for (int head = 0; head < heads; head++) {
        uint32_t *to = out + (uint64_t)head * out_stride / 4, *data = to + 16, count = 0, limit = 1u << (SW - 1);
        if (wanted) {
            int8_t q[G][HEAD_DIM];
#pragma HLS ARRAY_PARTITION variable=q complete dim=0
            for (int i = 0; i < G * HEAD_DIM; i++) {
                q[i / HEAD_DIM][i % HEAD_DIM] = query[head * G * HEAD_DIM + i];
                if (KW == 8 && q[i / HEAD_DIM][i % HEAD_DIM] == -128) status |= QUERY_RANGE;
            }
            for (int i = 0; i < 1 << 11; i++) high[i] = 0;
            for (int i = 0; i < 1 << LOW; i++) low[i] = 0;
            const uint8_t *token = keys + (uint64_t)head * key_stride + (uint64_t)first * TOKEN;
            for (uint32_t i = 0; i < n; i++) {
#pragma HLS PIPELINE II=2
                scores[i] = best(token + (uint64_t)i * TOKEN, q);
                high[scores[i] >> LOW]++;
            }
            uint32_t ties = n;
            limit = 0;
            if (mode != 2) {
                uint32_t want = wanted;
                uint32_t bin = walk(high, 1 << 11, want);
                for (uint32_t i = 0; i < n; i++) {
#pragma HLS PIPELINE II=1
                    if (scores[i] >> LOW == bin) low[scores[i] & ((1 << LOW) - 1)]++;
                }
                limit = bin << LOW | walk(low, 1 << LOW, want);
                ties = want;
            }
            for (uint32_t i = 0; i < n; i++) {
#pragma HLS PIPELINE II=1
                if (scores[i] < limit || (scores[i] == limit && !ties)) continue;
                ties -= scores[i] == limit;
                if (mode == 0) data[count] = first + i;
                else data[2 * count] = first + i, data[2 * count + 1] = scores[i] - (1u << (SW - 1));
                count++;
            }
        }
        to[0] = count;
        to[1] = limit - (1u << (SW - 1));
        to[2] = status;
        to[3] = 0;
    }
}
