/* Copies scattered records into slots of one buffer, as a promotion does. */
#include "common.h"

struct copying { const int64_t *from, *slots; char *to; int64_t n, width; int threads; };

static void copy_share(void *job, int share) {
    const struct copying *c = job;
    int64_t end = c->n * (share + 1) / c->threads;
    for (int64_t i = c->n * share / c->threads; i < end; i++)
        memcpy(c->to + c->slots[i] * c->width, (const char *)c->from[i], c->width);
}

/* from: addresses (n,). slots: distinct indices (n,) into `to`, in records of `width` bytes. */
void hi_copy(const int64_t *from, char *to, const int64_t *slots, int64_t n, int64_t width, int threads) {
    struct copying c = {from, slots, to, n, width, threads};
    split(copy_share, &c, threads);
}
