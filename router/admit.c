/* SPDX-License-Identifier: Apache-2.0 */
#include "router/admit.h"

#include <errno.h>
#include <stdlib.h>

#include "base/bug.h"
#include "base/banned.h"

typedef struct td_admit_tenant {
    td_list link; /* in a band, or spare */
    td_list entries;
    uint64_t tenant;
    int band;
} td_admit_tenant;

static td_admit_entry *entry_of(td_list *l)
{
    return TD_LIST_ENTRY(l, td_admit_entry, link);
}

static td_admit_tenant *tenant_of(td_list *l)
{
    return TD_LIST_ENTRY(l, td_admit_tenant, link);
}

int td_admit_init(td_admit *a, uint32_t max, uint64_t seed)
{
    TD_BUG_ON(max == 0);
    *a = (td_admit){.max = max, .rng.seed = seed};
    /* a line per waiting request is enough: a line without entries is given back */
    a->lines = calloc(max, sizeof *a->lines);
    if (!a->lines)
        return -ENOMEM;
    td_list_init(&a->moved);
    td_list_init(&a->spare);
    for (int i = 0; i < TD_ADMIT_BANDS; i++)
        td_list_init(&a->bands[i]);
    for (uint32_t i = 0; i < max; i++) {
        td_list_init(&a->lines[i].entries);
        td_list_add(&a->spare, &a->lines[i].link);
    }
    return 0;
}

void td_admit_done(td_admit *a)
{
    free(a->lines);
    a->lines = NULL;
}

static td_admit_tenant *line_of(td_admit *a, int band, uint64_t tenant)
{
    for (td_list *l = a->bands[band].next; l != &a->bands[band]; l = l->next)
        if (tenant_of(l)->tenant == tenant)
            return tenant_of(l);
    TD_BUG_ON(td_list_empty(&a->spare));
    td_admit_tenant *t = tenant_of(a->spare.next);
    td_list_del(&t->link);
    t->tenant = tenant;
    t->band = band;
    td_list_add(&a->bands[band], &t->link);
    return t;
}

int td_admit_push(td_admit *a, td_admit_entry *e)
{
    TD_BUG_ON(e->queued);
    if (a->n >= a->max)
        return -ENOSPC;
    int band = e->priority > 0 ? 0 : e->priority == 0 ? 1 : 2;
    e->line = line_of(a, band, e->tenant);
    td_list_add(&e->line->entries, &e->link);
    e->queued = 1;
    a->n++;
    return 0;
}

void td_admit_push_moved(td_admit *a, td_admit_entry *e)
{
    TD_BUG_ON(e->queued);
    e->line = NULL;
    td_list_add(&a->moved, &e->link);
    e->queued = 1;
    a->n_moved++;
}

void td_admit_remove(td_admit *a, td_admit_entry *e)
{
    if (!e->queued)
        return;
    td_list_del(&e->link);
    e->queued = 0;
    if (!e->line) {
        a->n_moved--;
        return;
    }
    a->n--;
    if (td_list_empty(&e->line->entries)) {
        td_list_del(&e->line->link);
        td_list_add(&a->spare, &e->line->link);
    }
    e->line = NULL;
}

void td_admit_take(td_admit *a, td_admit_entry *e)
{
    td_admit_tenant *t = e->queued ? e->line : NULL;
    td_admit_remove(a, e);
    if (t && !td_list_empty(&t->entries)) {
        td_list_del(&t->link);
        td_list_add(&a->bands[t->band], &t->link);
    }
}

td_admit_entry *td_admit_next(td_admit *a, uint64_t now_us)
{
    for (int b = 0; b < TD_ADMIT_BANDS; b++)
        for (td_list *l = a->bands[b].next; l != &a->bands[b]; l = l->next) {
            td_admit_entry *e = entry_of(tenant_of(l)->entries.next);
            if (e->not_before_us <= now_us)
                return e;
        }
    return NULL;
}

td_admit_entry *td_admit_moved_after(td_admit *a, td_admit_entry *prev, uint64_t now_us)
{
    for (td_list *l = prev ? prev->link.next : a->moved.next; l != &a->moved; l = l->next)
        if (entry_of(l)->not_before_us <= now_us)
            return entry_of(l);
    return NULL;
}

typedef struct visit {
    uint64_t now_us, wake_us;
    td_admit_entry *expired;
} visit;

static void visit_line(td_list *head, visit *v)
{
    for (td_list *l = head->next; l != head; l = l->next) {
        td_admit_entry *e = entry_of(l);
        if (e->expires_us <= v->now_us && !v->expired)
            v->expired = e;
        v->wake_us = TD_MIN(v->wake_us, e->expires_us);
        if (e->not_before_us > v->now_us)
            v->wake_us = TD_MIN(v->wake_us, e->not_before_us);
    }
}

static visit visit_all(const td_admit *a, uint64_t now_us)
{
    visit v = {.now_us = now_us, .wake_us = UINT64_MAX};
    visit_line((td_list *)&a->moved, &v);
    for (int b = 0; b < TD_ADMIT_BANDS; b++)
        for (td_list *l = a->bands[b].next; l != &a->bands[b]; l = l->next)
            visit_line(&tenant_of(l)->entries, &v);
    return v;
}

td_admit_entry *td_admit_expired(td_admit *a, uint64_t now_us)
{
    return visit_all(a, now_us).expired;
}

uint64_t td_admit_wake_us(const td_admit *a, uint64_t now_us)
{
    return visit_all(a, now_us).wake_us;
}

uint32_t td_admit_retry_ms(td_admit *a)
{
    /* between 1 s and a bound that grows with the queue from 2 s to 30 s: clients that were refused
     * together come back apart */
    uint64_t span = TD_ADMIT_RETRY_MAX_MS - 2 * TD_ADMIT_RETRY_MIN_MS;
    uint64_t bound = TD_ADMIT_RETRY_MIN_MS + span * TD_MIN(a->n, a->max) / a->max;
    return (uint32_t)(TD_ADMIT_RETRY_MIN_MS + td_rng_below(&a->rng, bound + 1));
}

uint32_t td_admit_len(const td_admit *a)
{
    return a->n + a->n_moved;
}
