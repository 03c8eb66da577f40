// What torch's CPU allocator holds, counted where it asks for it: posix_memalign and free, on every thread.
//
//     cc -O2 -shared -fPIC -o allocations.so allocations.c        then run with LD_PRELOAD=allocations.so
//
// Blocks under 4 KiB are left out. A table by address (open addressing, a lock) remembers each block's size, since
// only then is a free of something else told from one of ours.
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

enum { SLOTS = 1 << 20, SMALLEST = 4096 };

extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static struct { void *address; size_t bytes; } held[SLOTS];
static size_t total, most, blocks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t slot_of(void *address) { return ((uintptr_t)address >> 6) * 0x9E3779B97F4A7C15ull >> 44; }

int posix_memalign(void **address, size_t alignment, size_t bytes) {
    *address = __libc_memalign(alignment, bytes);
    if (!*address) return 12;  // ENOMEM
    if (bytes < SMALLEST) return 0;
    pthread_mutex_lock(&lock);
    if (2 * ++blocks > SLOTS) abort();  // the table would fill: enlarge SLOTS
    size_t slot = slot_of(*address);
    while (held[slot].address) slot = (slot + 1) % SLOTS;
    held[slot].address = *address;
    held[slot].bytes = bytes;
    total += bytes;
    if (total > most) most = total;
    pthread_mutex_unlock(&lock);
    return 0;
}

void free(void *address) {
    if (address && !((uintptr_t)address & 15)) {
        pthread_mutex_lock(&lock);
        size_t slot = slot_of(address);
        while (held[slot].address && held[slot].address != address) slot = (slot + 1) % SLOTS;
        if (held[slot].address) {
            total -= held[slot].bytes;
            blocks--;
            // Close the gap, so that every block stays reachable from its own slot.
            size_t gap = slot;
            for (size_t next = (gap + 1) % SLOTS; held[next].address; next = (next + 1) % SLOTS) {
                size_t home = slot_of(held[next].address);
                if ((next - home + SLOTS) % SLOTS >= (next - gap + SLOTS) % SLOTS) {
                    held[gap] = held[next];
                    gap = next;
                }
            }
            held[gap].address = NULL;
        }
        pthread_mutex_unlock(&lock);
    }
    __libc_free(address);
}

// The most that was held at once since the last call of `watch`, in bytes.
size_t held_at_most(void) { return most; }
void watch(void) { most = total; }
