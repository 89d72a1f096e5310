/* SPDX-License-Identifier: Apache-2.0 */
#include "text/reasoning.h"

#include <string.h>

#include "base/banned.h"

static const char open_tag[] = "<think>", close_tag[] = "</think>";

void td_reasoning_init(td_reasoning *r, int starts_inside)
{
    /* an answer that never had tags keeps its leading white space */
    *r = (td_reasoning){.inside = starts_inside != 0, .started = !starts_inside, .may_open = 1};
    td_strbuf_init(&r->space);
}

void td_reasoning_done(td_reasoning *r)
{
    td_strbuf_done(&r->space);
}

int td_reasoning_is_inside(const td_reasoning *r)
{
    return r->inside;
}

static int is_space(char c)
{
    return c == ' ' || c == '\n' || c == '\r' || c == '\t';
}

/* White space is kept back until text follows it on the same side of the tags. */
static void put(td_reasoning *r, char c, td_strbuf *reasoning, td_strbuf *content)
{
    td_strbuf *out = r->inside ? reasoning : content;
    if (is_space(c)) {
        if (r->started)
            td_strbuf_addc(&r->space, c);
        return;
    }
    td_strbuf_add(out, r->space.data, r->space.len);
    td_strbuf_reset(&r->space);
    td_strbuf_addc(out, c);
    r->started = 1;
    r->may_open = 0;
}

/* The tag that c would continue or begin. The opening one counts only before any text: later it is
 * what the answer says. */
static const char *tag(const td_reasoning *r, char c)
{
    int opening = r->may_open && r->n_held && (r->n_held == 1 ? c : r->held[1]) == open_tag[1];
    if (r->inside)
        return opening ? open_tag : close_tag;
    return r->may_open ? open_tag : NULL;
}

static void held_was_text(td_reasoning *r, td_strbuf *reasoning, td_strbuf *content)
{
    for (unsigned i = 0; i < r->n_held; i++)
        put(r, r->held[i], reasoning, content);
    r->n_held = 0;
}

static void step(td_reasoning *r, char c, td_strbuf *reasoning, td_strbuf *content)
{
    const char *t = tag(r, c);
    /* '<' occurs only at a tag's start: a mismatch can begin a tag only at this very byte */
    if (!t || c != t[r->n_held]) {
        held_was_text(r, reasoning, content);
        t = tag(r, c);
        if (!t || c != t[0]) {
            put(r, c, reasoning, content);
            return;
        }
    }
    r->held[r->n_held++] = c;
    if (t[r->n_held])
        return;
    r->n_held = 0;
    r->inside = t == open_tag;
    r->started = r->may_open = 0;
    td_strbuf_reset(&r->space);
}

void td_reasoning_add(td_reasoning *r, const char *text, size_t n, td_strbuf *reasoning,
                      td_strbuf *content)
{
    for (size_t i = 0; i < n; i++)
        step(r, text[i], reasoning, content);
}

void td_reasoning_finish(td_reasoning *r, td_strbuf *reasoning, td_strbuf *content)
{
    held_was_text(r, reasoning, content);
    if (!r->inside) /* trailing white space of an answer is the answer's */
        td_strbuf_add(content, r->space.data, r->space.len);
    td_strbuf_reset(&r->space);
}
