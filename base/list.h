/* SPDX-License-Identifier: Apache-2.0 */
/* Intrusive doubly linked list with a sentinel head. */
#ifndef TD_BASE_LIST_H
#define TD_BASE_LIST_H

#include <stddef.h>

typedef struct td_list {
    struct td_list *prev, *next;
} td_list;

static inline void td_list_init(td_list *l)
{
    l->prev = l->next = l;
}

static inline int td_list_empty(const td_list *head)
{
    return head->next == head;
}

/* Insert before `at`; before the head is the back. */
static inline void td_list_add(td_list *at, td_list *node)
{
    node->prev = at->prev;
    node->next = at;
    at->prev->next = node;
    at->prev = node;
}

/* Remove; harmless on a node that is its own list. */
static inline void td_list_del(td_list *node)
{
    node->prev->next = node->next;
    node->next->prev = node->prev;
    td_list_init(node);
}

#define TD_LIST_ENTRY(node, type, member) ((type *)((char *)(node)-offsetof(type, member)))
/* The current node may be removed inside the loop. */
#define TD_LIST_FOR(it, head)                                                                      \
    for (td_list *it = (head)->next, *it##_next = it->next; it != (head);                          \
         it = it##_next, it##_next = it->next)

#endif
