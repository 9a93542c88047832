/* Copies scattered records into slots of one buffer, as a promotion does. */
#include "common.h"

struct copying { const int64_t *from, *slots; char *to; int64_t n, width; int threads; };

static void copy_share(void *job, int share) {
    const struct copying *c = job;
    int64_t end = c->n * (share + 1) / c->threads;
    for (int64_t i = c->n * share / c->threads; i < end; i++)
        memcpy(c->to + c->slots[i] * c->width, (const char *)c->from[i], c->width);
}

/* from: addresses (n,). slots: distinct indices (n,) into `to`, which has room for `room` records of `width` bytes.
 * Returns 0, NO_MEMORY, or WRONG for an address that is null, or a slot out of range or twice. */
int hi_copy(const int64_t *from, char *to, const int64_t *slots, int64_t n, int64_t room, int64_t width, int threads) {
    uint8_t *taken = calloc(room + 1, 1);
    int wrong = !usable(from, n, 1);
    if (!taken) return NO_MEMORY;
    for (int64_t i = 0; i < n && !wrong; i++) {
        wrong = slots[i] < 0 || slots[i] >= room || taken[slots[i]];
        if (!wrong) taken[slots[i]] = 1;
    }
    free(taken);
    if (wrong) return WRONG;
    struct copying c = {from, slots, to, n, width, threads};
    split(copy_share, &c, threads);
    return 0;
}
