/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "base/strbuf.h"
#include "base/banned.h"

static int lead_length(unsigned char c)
{
    return c < 0x80                ? 1
           : c >= 0xC2 && c < 0xE0 ? 2
           : c >= 0xE0 && c < 0xF0 ? 3
           : c >= 0xF0 && c < 0xF5 ? 4
                                   : 0;
}

/* Table 3-7 of the Unicode standard: which second byte may follow a lead byte. */
static int second_ok(unsigned char lead, unsigned char c)
{
    unsigned char lo = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned char hi = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    return c >= lo && c <= hi;
}

int td_utf8_decode(const char *s, size_t n, uint32_t *ret_cp)
{
    const unsigned char *p = (const unsigned char *)s;
    int len = n ? lead_length(p[0]) : 0;
    if (len == 0 || (size_t)len > n || (len > 1 && !second_ok(p[0], p[1])))
        return -EILSEQ;
    uint32_t cp = len == 1 ? p[0] : p[0] & (0x7Fu >> len);
    for (int i = 1; i < len; i++) {
        if ((p[i] & 0xC0) != 0x80)
            return -EILSEQ;
        cp = cp << 6 | (p[i] & 0x3Fu);
    }
    *ret_cp = cp;
    return len;
}

int td_utf8_valid(const char *s, size_t n)
{
    size_t at = 0;
    uint32_t cp;
    while (at < n) {
        uint64_t eight;
        if (n - at >= 8 && (memcpy(&eight, s + at, 8), (eight & 0x8080808080808080ull) == 0)) {
            at += 8;
            continue;
        }
        int len = td_utf8_decode(s + at, n - at, &cp);
        if (len < 0)
            return 0;
        at += (size_t)len;
    }
    return 1;
}

size_t td_utf8_whole(const char *s, size_t n)
{
    const unsigned char *p = (const unsigned char *)s;
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        unsigned char c = p[n - back];
        if ((c & 0xC0) == 0x80)
            continue;
        int len = lead_length(c);
        if (len <= (int)back)
            return n; /* complete, or invalid */
        for (size_t i = 1; i < back; i++)
            if (i == 1 ? !second_ok(c, p[n - back + i]) : (p[n - back + i] & 0xC0) != 0x80)
                return n;
        return n - back;
    }
    return n;
}

int td_utf8_encode(uint32_t cp, char out[4])
{
    if (cp < 0x80) {
        out[0] = (char)cp;
        return 1;
    }
    int len = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    for (int i = len - 1; i > 0; i--) {
        out[i] = (char)(0x80 | (cp & 0x3F));
        cp >>= 6;
    }
    out[0] = (char)((0xF00 >> len & 0xFF) | cp);
    return len;
}
