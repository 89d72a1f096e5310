/* SPDX-License-Identifier: Apache-2.0 */
/* Bounded little-endian reader and writer with sticky failure, and overflow-checked size
 * arithmetic. */
#ifndef TD_BASE_BYTES_H
#define TD_BASE_BYTES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct td_reader {
    const uint8_t *p, *end;
    int failed; /* set by the first read past the end; later reads give 0 */
} td_reader;

static inline void td_reader_init(td_reader *r, const void *p, size_t n)
{
    r->p = p;
    r->end = r->p + n;
    r->failed = 0;
}

static inline const uint8_t *td_read_bytes(td_reader *r, size_t n)
{
    if ((size_t)(r->end - r->p) < n) {
        r->failed = 1;
        r->p = r->end;
        return NULL;
    }
    const uint8_t *p = r->p;
    r->p += n;
    return p;
}

#define TD_READ_(name, type)                                                                       \
    static inline type td_read_##name(td_reader *r)                                                \
    {                                                                                              \
        type v = 0;                                                                                \
        const uint8_t *p = td_read_bytes(r, sizeof v);                                             \
        if (p)                                                                                     \
            memcpy(&v, p, sizeof v);                                                               \
        return v;                                                                                  \
    }
TD_READ_(u8, uint8_t)
TD_READ_(u16, uint16_t)
TD_READ_(u32, uint32_t)
TD_READ_(u64, uint64_t)
#undef TD_READ_

typedef struct td_writer {
    uint8_t *p, *end;
    int failed;
} td_writer;

static inline void td_writer_init(td_writer *w, void *p, size_t n)
{
    w->p = p;
    w->end = w->p + n;
    w->failed = 0;
}

static inline void td_write_bytes(td_writer *w, const void *src, size_t n)
{
    if ((size_t)(w->end - w->p) < n) {
        w->failed = 1;
        return;
    }
    if (n)
        memcpy(w->p, src, n);
    w->p += n;
}

#define TD_WRITE_(name, type)                                                                      \
    static inline void td_write_##name(td_writer *w, type v)                                       \
    {                                                                                              \
        td_write_bytes(w, &v, sizeof v);                                                           \
    }
TD_WRITE_(u8, uint8_t)
TD_WRITE_(u16, uint16_t)
TD_WRITE_(u32, uint32_t)
TD_WRITE_(u64, uint64_t)
#undef TD_WRITE_

/* a*b and a+b into *ret; 1 on overflow (and *ret untouched is not promised). */
#define td_mul_overflow(a, b, ret) __builtin_mul_overflow(a, b, ret)
#define td_add_overflow(a, b, ret) __builtin_add_overflow(a, b, ret)

#endif
