/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/frame.h"

#include <errno.h>

#include "base/bug.h"
#include "base/bytes.h"
#include "base/banned.h"

void td_preamble_pack(const td_preamble *p, uint8_t out[TD_PREAMBLE_BYTES])
{
    td_writer w;
    td_writer_init(&w, out, TD_PREAMBLE_BYTES);
    td_write_u16(&w, TD_WIRE_MAGIC);
    td_write_u8(&w, p->major);
    td_write_u8(&w, p->minor);
    td_write_u8(&w, p->type);
    td_write_u8(&w, p->flags);
    td_write_u16(&w, p->n_attachments);
    td_write_u64(&w, p->stream);
    td_write_u32(&w, p->sequence);
    td_write_u32(&w, p->session);
    TD_BUG_ON(w.failed || w.p != w.end);
}

int td_preamble_unpack(const void *bytes, size_t n, td_preamble *ret_p)
{
    td_reader r;
    td_preamble p;
    td_reader_init(&r, bytes, n);
    uint16_t magic = td_read_u16(&r);
    p.major = td_read_u8(&r);
    p.minor = td_read_u8(&r);
    p.type = td_read_u8(&r);
    p.flags = td_read_u8(&r);
    p.n_attachments = td_read_u16(&r);
    p.stream = td_read_u64(&r);
    p.sequence = td_read_u32(&r);
    p.session = td_read_u32(&r);
    if (r.failed || r.p != r.end || magic != TD_WIRE_MAGIC || p.major != TD_WIRE_MAJOR)
        return -EPROTO;
    *ret_p = p;
    return 0;
}
