/* io_uring through the raw system calls: one call moves a batch of reads or writes at a given queue depth, from a file,
 * a block device, or an NVMe namespace by passthrough commands. A ring belongs to one thread at a time.
 * Registered buffers and files are not used: measured, no gain. */
#include <errno.h>
#include "common.h"

#define NVME_STATUS 0x10000  /* added to the status of a command that the controller rejected */

/* A wide submission entry (IORING_SETUP_SQE128) with struct nvme_uring_cmd of <linux/nvme_ioctl.h> (Linux 5.19). */
struct nvme_entry {
    uint8_t opcode, flags;
    uint16_t priority;
    int32_t fd;
    uint32_t ioctl, unused[5];
    uint64_t user_data, more;
    struct {
        uint8_t opcode, flags;
        uint16_t rsvd1;
        uint32_t nsid, cdw2, cdw3;
        uint64_t metadata, addr;
        uint32_t metadata_len, data_len, cdw10, cdw11, cdw12, cdw13, cdw14, cdw15, timeout_ms, rsvd2;
    } command;
    uint64_t rest;
};
_Static_assert(sizeof(struct nvme_entry) == 128, "as the kernel lays it out");

/* Encodes one NVMe READ or WRITE. offset and length are multiples of `lba`, the bytes of a logical block. */
void hi_nvme_entry(struct nvme_entry *entry, int fd, int write, int64_t nsid, int64_t lba, int64_t offset,
                   int64_t address, int64_t length) {
    memset(entry, 0, sizeof *entry);
    entry->opcode = 46;  /* IORING_OP_URING_CMD */
    entry->fd = fd;
    entry->ioctl = 0xC0484E80;  /* NVME_URING_CMD_IO: _IOWR('N', 0x80, struct nvme_uring_cmd) */
    entry->command.opcode = write ? 1 : 2;
    entry->command.nsid = (uint32_t)nsid;
    entry->command.addr = (uint64_t)address;
    entry->command.data_len = (uint32_t)length;
    entry->command.cdw10 = (uint32_t)(offset / lba);
    entry->command.cdw11 = (uint32_t)(offset / lba >> 32);
    entry->command.cdw12 = (uint32_t)(length / lba - 1);
}

/* Adds a completion's result to `done` bytes of `length`. Returns 0 when all are moved, EAGAIN when the request must be
 * submitted again, else the error: an errno, -1 at the end of the file, or NVME_STATUS plus the controller's status. */
int hi_ring_result(int command, int result, int64_t length, int64_t *done) {
    if (result == -EINTR || result == -EAGAIN) return EAGAIN;
    if (result < 0) return -result;
    if (command && result) return NVME_STATUS + result;
    *done = command ? length : *done + result;  /* a command is all or nothing */
    return *done == length ? 0 : result ? EAGAIN : -1;
}

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct ring {
    int fd, timed;
    int64_t in_flight;  /* requests of a run that timed out */
    unsigned depth, *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    char *entries, *results;
    size_t entry_bytes, result_bytes;
    void *maps[2];
    size_t sizes[2];
};

void hi_ring_close(struct ring *ring) {
    for (int i = 0; i < 2; i++)
        if (ring->maps[i]) munmap(ring->maps[i], ring->sizes[i]);
    if (ring->fd >= 0) close(ring->fd);
    free(ring);
}

/* A ring of `depth` entries, or NULL and an errno in *error: ENOSYS without io_uring, EPERM where it is forbidden.
 * A sandbox may allow the setup and forbid io_uring_enter, so that is called once, with nothing to do.
 * `wide` entries carry NVMe commands (IORING_SETUP_SQE128 and CQE32); EINVAL before Linux 5.19. */
struct ring *hi_ring_open(unsigned depth, int wide, int *error) {
    struct io_uring_params about = {.flags = IORING_SETUP_CLAMP | (wide ? 1u << 10 | 1u << 11 : 0)};
    struct ring *ring = calloc(1, sizeof *ring);
    *error = ENOMEM;
    if (!ring) return NULL;
    ring->fd = (int)syscall(__NR_io_uring_setup, depth, &about);
    if (ring->fd < 0) {
        *error = errno;
        hi_ring_close(ring);
        return NULL;
    }
    ring->entry_bytes = wide ? 128 : 64;
    ring->result_bytes = wide ? 32 : 16;
    unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_RW_CUR_POS;  /* Linux 5.6 */
    size_t submit = about.sq_off.array + about.sq_entries * sizeof(unsigned);
    size_t complete = about.cq_off.cqes + about.cq_entries * ring->result_bytes;
    ring->sizes[0] = submit > complete ? submit : complete;
    ring->sizes[1] = about.sq_entries * ring->entry_bytes;
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
    if (syscall(__NR_io_uring_enter, ring->fd, 0, 0, 0, NULL, 0) < 0) {
        *error = errno;
        hi_ring_close(ring);
        return NULL;
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
    ring->results = base + about.cq_off.cqes;
    ring->entries = ring->maps[1];
    return ring;
}

/* Submits `queued` entries and waits for `least` completions or the timeout. Returns as io_uring_enter does. */
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

/* Requests of a timed-out run that are still in flight. Until there are none the kernel may write to their memory. */
int64_t hi_ring_in_flight(struct ring *ring) {
    unsigned head = *ring->cq_head, tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
    ring->in_flight -= tail - head;
    __atomic_store_n(ring->cq_head, tail, __ATOMIC_RELEASE);
    return ring->in_flight;
}

/* Moves n pieces between the file of each at offsets and memory at addresses; done (n,) counts bytes. Short transfers are
 * continued.
 * With `lba` each piece is one NVMe command to namespace `nsid` (a wide ring); without it, a read or write.
 * Returns 0 or an error as `hi_ring_result` does, with the failed piece's index in *failed; by then no request is in
 * flight. ETIMEDOUT with *failed = -1: no completion for timeout_ms (0: no limit), `hi_ring_in_flight` remain.
 * With `sums`, each piece is verified as soon as it is read, while others are in flight: EBADMSG, and done[*failed] is
 * where the damaged block begins. */
int hi_ring_run(struct ring *ring, const int32_t *fds, int write, int64_t n, const int64_t *offsets,
                const int64_t *addresses, const int64_t *lengths, int64_t *done, int64_t *failed, int64_t timeout_ms,
                int isa, uint32_t *sums, int64_t nsid, int64_t lba) {
    int64_t again[4096], waiting = 0, next = 0, in_flight = 0;
    unsigned depth = ring->depth < 4096 ? ring->depth : 4096, queued = 0;
    int error = 0, silent = 0;
    memset(done, 0, n * sizeof *done);
    while (in_flight || (!error && (next < n || waiting))) {
        unsigned tail = *ring->sq_tail;
        for (; !error && in_flight < depth && (waiting || next < n); in_flight++, queued++, tail++) {
            int64_t i = waiting ? again[--waiting] : next++;
            unsigned slot = tail & *ring->sq_mask;
            int64_t left = lengths[i] - done[i];
            struct io_uring_sqe *entry = (struct io_uring_sqe *)(ring->entries + slot * ring->entry_bytes);
            if (lba) {
                hi_nvme_entry((struct nvme_entry *)entry, fds[i], write, nsid, lba, offsets[i], addresses[i], lengths[i]);
            } else {
                memset(entry, 0, ring->entry_bytes);
                entry->opcode = write ? IORING_OP_WRITE : IORING_OP_READ;
                entry->fd = fds[i];
                entry->off = (uint64_t)(offsets[i] + done[i]);
                entry->addr = (uint64_t)(addresses[i] + done[i]);
                entry->len = left > 1 << 30 ? 1u << 30 : (unsigned)left;
            }
            entry->user_data = (uint64_t)i;
            ring->sq_array[slot] = slot;
        }
        __atomic_store_n(ring->sq_tail, tail, __ATOMIC_RELEASE);
        unsigned most = (unsigned)in_flight, some = next < n ? (depth + 3) / 4 : most;  /* refill after a quarter */
        long taken = enter(ring, queued, most < some ? most : some, (timeout_ms + 1) / 2);
        int code = taken < 0 ? errno : 0, came = *ring->cq_head != __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
        if (taken >= 0) queued -= (unsigned)taken;
        if (came) silent = 0;
        else if ((taken >= 0 || code == ETIME) && ++silent == 2 && ring->timed && timeout_ms > 0) {
            *failed = -1;  /* two half timeouts: a call that also submitted does not report that its time ran out */
            ring->in_flight = in_flight - queued;
            return ETIMEDOUT;
        }
        if (taken < 0 && code != ETIME && code != EINTR && code != EAGAIN && code != EBUSY) {
            *failed = -1;  /* the ring is unusable */
            return code;
        }
        unsigned head = *ring->cq_head;
        for (; head != __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE); head++, in_flight--) {
            const struct io_uring_cqe *result =
                (struct io_uring_cqe *)(ring->results + (head & *ring->cq_mask) * ring->result_bytes);
            int64_t i = (int64_t)result->user_data;
            int outcome = hi_ring_result(lba != 0, result->res, lengths[i], done + i);
            if (outcome == EAGAIN) {
                again[waiting++] = i;
            } else if (outcome && !error) {
                error = outcome;
                *failed = i;
            } else if (sums && !write && !error) {  /* the piece is still in this core's cache */
                int64_t bad = hi_checksums(isa, 0, 1, offsets + i, addresses + i, lengths + i, sums);
                if (bad >= 0) {
                    error = EBADMSG;
                    *failed = i;
                    done[i] = bad - offsets[i];
                }
            }
        }
        __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
    }
    return error;
}
#else
struct ring;
void hi_ring_close(struct ring *ring) { (void)ring; }
struct ring *hi_ring_open(unsigned depth, int wide, int *error) {
    (void)depth, (void)wide;
    *error = ENOSYS;
    return NULL;
}
int64_t hi_ring_in_flight(struct ring *ring) {
    (void)ring;
    return 0;
}
int hi_ring_run(struct ring *ring, const int32_t *fds, int write, int64_t n, const int64_t *offsets,
                const int64_t *addresses, const int64_t *lengths, int64_t *done, int64_t *failed, int64_t timeout_ms,
                int isa, uint32_t *sums, int64_t nsid, int64_t lba) {
    (void)timeout_ms, (void)isa, (void)sums, (void)ring, (void)fds, (void)write, (void)n, (void)offsets;
    (void)addresses, (void)lengths, (void)done, (void)failed, (void)nsid, (void)lba;
    return ENOSYS;
}
#endif
