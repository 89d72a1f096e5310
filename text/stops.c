/* SPDX-License-Identifier: Apache-2.0 */
#include "text/stops.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/banned.h"

enum { STOPS_MAX = 16, BYTES_MAX = 256 };

/* One string with its failure function (Knuth, Morris, Pratt 1977). */
typedef struct pattern {
    char text[BYTES_MAX];
    unsigned short fail[BYTES_MAX + 1];
    unsigned short n, at; /* at: length of the longest prefix that is a suffix of the text so far */
} pattern;

struct td_stops {
    td_strbuf held; /* text that may be the beginning of a stop string */
    int hit;
    size_t n;
    pattern list[];
};

static void prepare(pattern *p, td_str s)
{
    memcpy(p->text, s.ptr, s.len);
    p->n = (unsigned short)s.len;
    p->fail[0] = p->fail[1] = 0;
    unsigned short k = 0;
    for (unsigned short i = 1; i < p->n; i++) {
        while (k && p->text[i] != p->text[k])
            k = p->fail[k];
        k = (unsigned short)(k + (p->text[i] == p->text[k]));
        p->fail[i + 1] = k;
    }
}

int td_stops_new(const td_str *stops, size_t n, td_stops **ret_stops)
{
    if (n == 0 || n > STOPS_MAX)
        return -EINVAL;
    for (size_t i = 0; i < n; i++)
        if (stops[i].len == 0 || stops[i].len > BYTES_MAX)
            return -EINVAL;
    td_stops *s = calloc(1, sizeof *s + n * sizeof *s->list);
    if (!s)
        return -ENOMEM;
    td_strbuf_init(&s->held);
    s->n = n;
    for (size_t i = 0; i < n; i++)
        prepare(&s->list[i], stops[i]);
    *ret_stops = s;
    return 0;
}

void td_stops_free(td_stops *s)
{
    if (!s)
        return;
    td_strbuf_done(&s->held);
    free(s);
}

/* Returns 1 when the pattern is complete with this byte. */
static int advance(pattern *p, char c)
{
    while (p->at && p->text[p->at] != c)
        p->at = p->fail[p->at];
    p->at = (unsigned short)(p->at + (p->text[p->at] == c));
    return p->at == p->n;
}

int td_stops_add(td_stops *s, const char *text, size_t n, td_strbuf *out)
{
    for (size_t i = 0; i < n && !s->hit; i++) {
        size_t longest = 0, complete = 0;
        td_strbuf_addc(&s->held, text[i]);
        for (size_t k = 0; k < s->n; k++) {
            if (advance(&s->list[k], text[i]) && s->list[k].n > complete)
                complete = s->list[k].n;
            if (s->list[k].at > longest)
                longest = s->list[k].at;
        }
        size_t certain = s->held.len - (complete ? complete : longest);
        td_strbuf_add(out, s->held.data, certain);
        td_strbuf_drop(&s->held, certain);
        s->hit = complete != 0;
    }
    return s->hit;
}

void td_stops_finish(td_stops *s, td_strbuf *out)
{
    if (!s->hit)
        td_strbuf_add(out, s->held.data, s->held.len);
    td_strbuf_reset(&s->held);
}
