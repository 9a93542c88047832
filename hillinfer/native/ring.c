/* io_uring through the raw system calls: one call moves a whole batch of reads or writes at a given queue depth.
 * A ring belongs to one thread at a time. Registered buffers and files are left out: measured, they brought nothing. */
#include <errno.h>
#include "common.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct ring {
    int fd, timed;
    int64_t flying;  /* what a run that gave up left under way */
    unsigned depth, *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *entries;
    struct io_uring_cqe *results;
    void *maps[2];
    size_t sizes[2];
};

void hi_ring_close(struct ring *ring) {
    for (int i = 0; i < 2; i++)
        if (ring->maps[i]) munmap(ring->maps[i], ring->sizes[i]);
    if (ring->fd >= 0) close(ring->fd);
    free(ring);
}

/* A ring of `depth` entries, or NULL and the reason in *error: ENOSYS and EPERM where the system has or allows none. */
struct ring *hi_ring_open(unsigned depth, int *error) {
    struct io_uring_params about = {.flags = IORING_SETUP_CLAMP};
    struct ring *ring = calloc(1, sizeof *ring);
    *error = ENOMEM;
    if (!ring) return NULL;
    ring->fd = (int)syscall(__NR_io_uring_setup, depth, &about);
    if (ring->fd < 0) {
        *error = errno;
        hi_ring_close(ring);
        return NULL;
    }
    unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_RW_CUR_POS;  /* Linux 5.6 */
    size_t submit = about.sq_off.array + about.sq_entries * sizeof(unsigned);
    size_t complete = about.cq_off.cqes + about.cq_entries * sizeof(struct io_uring_cqe);
    ring->sizes[0] = submit > complete ? submit : complete;
    ring->sizes[1] = about.sq_entries * sizeof(struct io_uring_sqe);
    for (int i = 0; i < 2; i++) {
        ring->maps[i] = mmap(NULL, ring->sizes[i], PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd,
                             i ? IORING_OFF_SQES : IORING_OFF_SQ_RING);
        *error = (about.features & needed) != needed ? ENOSYS : ring->maps[i] == MAP_FAILED ? errno : 0;
        if (*error) {
            if (ring->maps[i] == MAP_FAILED) ring->maps[i] = NULL;
            hi_ring_close(ring);
            return NULL;
        }
    }
    char *base = ring->maps[0];
    ring->depth = about.sq_entries;
#ifdef IORING_ENTER_EXT_ARG
    ring->timed = !!(about.features & IORING_FEAT_EXT_ARG);  /* Linux 5.11 */
#endif
    ring->sq_tail = (unsigned *)(base + about.sq_off.tail);
    ring->sq_mask = (unsigned *)(base + about.sq_off.ring_mask);
    ring->sq_array = (unsigned *)(base + about.sq_off.array);
    ring->cq_head = (unsigned *)(base + about.cq_off.head);
    ring->cq_tail = (unsigned *)(base + about.cq_off.tail);
    ring->cq_mask = (unsigned *)(base + about.cq_off.ring_mask);
    ring->results = (struct io_uring_cqe *)(base + about.cq_off.cqes);
    ring->entries = ring->maps[1];
    return ring;
}

/* Submits what is queued and waits for `least` completions, or until nothing happens for so long. As the call itself. */
static long enter(struct ring *ring, unsigned queued, unsigned least, int64_t timeout_ms) {
#ifdef IORING_ENTER_EXT_ARG
    if (ring->timed && timeout_ms > 0) {
        struct __kernel_timespec wait = {.tv_sec = timeout_ms / 1000, .tv_nsec = timeout_ms % 1000 * 1000000};
        struct io_uring_getevents_arg about = {.ts = (uint64_t)(uintptr_t)&wait};
        return syscall(__NR_io_uring_enter, ring->fd, queued, least, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG,
                       &about, sizeof about);
    }
#endif
    return syscall(__NR_io_uring_enter, ring->fd, queued, least, IORING_ENTER_GETEVENTS, NULL, 0);
}

/* How many requests of a run that gave up are still under way: until 0 the kernel may write to their memory. */
int64_t hi_ring_flying(struct ring *ring) {
    unsigned head = *ring->cq_head, tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
    ring->flying -= tail - head;
    __atomic_store_n(ring->cq_head, tail, __ATOMIC_RELEASE);
    return ring->flying;
}

/* Moves n pieces between fd at offsets and memory at addresses; done (n,) counts bytes. Short transfers go on where
 * they ended. Returns 0; or an errno, -1 where the file ended, and in *failed which piece: the rest that was under way
 * has then come to its end, too. ETIMEDOUT: nothing came for timeout_ms, and `hi_ring_flying` are still under way. */
int hi_ring_run(struct ring *ring, int fd, int write, int64_t n, const int64_t *offsets, const int64_t *addresses,
                const int64_t *lengths, int64_t *done, int64_t *failed, int64_t timeout_ms) {
    int64_t again[4096], waiting = 0, next = 0, flying = 0;
    unsigned depth = ring->depth < 4096 ? ring->depth : 4096, queued = 0;
    int error = 0;
    memset(done, 0, n * sizeof *done);
    while (flying || (!error && (next < n || waiting))) {
        unsigned tail = *ring->sq_tail;
        for (; !error && flying < depth && (waiting || next < n); flying++, queued++, tail++) {
            int64_t i = waiting ? again[--waiting] : next++;
            unsigned slot = tail & *ring->sq_mask;
            int64_t left = lengths[i] - done[i];
            struct io_uring_sqe *entry = ring->entries + slot;
            memset(entry, 0, sizeof *entry);
            entry->opcode = write ? IORING_OP_WRITE : IORING_OP_READ;
            entry->fd = fd;
            entry->off = (uint64_t)(offsets[i] + done[i]);
            entry->addr = (uint64_t)(addresses[i] + done[i]);
            entry->len = left > 1 << 30 ? 1u << 30 : (unsigned)left;
            entry->user_data = (uint64_t)i;
            ring->sq_array[slot] = slot;
        }
        __atomic_store_n(ring->sq_tail, tail, __ATOMIC_RELEASE);
        unsigned most = (unsigned)flying, some = next < n ? (depth + 3) / 4 : most;  /* a quarter, then refill */
        long taken = enter(ring, queued, most < some ? most : some, timeout_ms);
        if (taken >= 0) {
            queued -= (unsigned)taken;
        } else if (errno == ETIME) {
            if (*ring->cq_head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE)) {
                *failed = -1;
                ring->flying = flying - queued;
                return ETIMEDOUT;
            }
        } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
            *failed = -1;  /* the ring is of no use any more */
            return errno;
        }
        unsigned head = *ring->cq_head;
        for (; head != __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE); head++, flying--) {
            struct io_uring_cqe *result = ring->results + (head & *ring->cq_mask);
            int64_t i = (int64_t)result->user_data;
            if (result->res > 0) done[i] += result->res;
            int again_is_fine = result->res > 0 || result->res == -EINTR || result->res == -EAGAIN;
            if (done[i] < lengths[i] && again_is_fine) {
                again[waiting++] = i;
            } else if (done[i] < lengths[i] && !error) {
                error = result->res ? -result->res : -1;
                *failed = i;
            }
        }
        __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
    }
    return error;
}
#else
struct ring;
void hi_ring_close(struct ring *ring) { (void)ring; }
struct ring *hi_ring_open(unsigned depth, int *error) {
    (void)depth;
    *error = ENOSYS;
    return NULL;
}
int64_t hi_ring_flying(struct ring *ring) {
    (void)ring;
    return 0;
}
int hi_ring_run(struct ring *ring, int fd, int write, int64_t n, const int64_t *offsets, const int64_t *addresses,
                const int64_t *lengths, int64_t *done, int64_t *failed, int64_t timeout_ms) {
    (void)timeout_ms, (void)ring, (void)fd, (void)write, (void)n, (void)offsets, (void)addresses, (void)lengths, (void)done, (void)failed;
    return ENOSYS;
}
#endif
