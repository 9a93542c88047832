/* Records that lie anywhere into slots of one buffer: what a promotion moves. */
#include "common.h"

struct copying { const int64_t *from, *slots; char *to; int64_t n, width; int threads; };

static void copy_share(void *job, int share) {
    const struct copying *c = job;
    int64_t end = c->n * (share + 1) / c->threads;
    for (int64_t i = c->n * share / c->threads; i < end; i++)
        memcpy(c->to + c->slots[i] * c->width, (const char *)c->from[i], c->width);
}

/* from (n,) addresses; slots (n,) places in `to`, in records of `width` bytes, each once. */
void hi_copy(const int64_t *from, char *to, const int64_t *slots, int64_t n, int64_t width, int threads) {
    struct copying c = {from, slots, to, n, width, threads};
    split(copy_share, &c, threads);
}
