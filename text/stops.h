/* SPDX-License-Identifier: Apache-2.0 */
/* Stop strings over streamed text: text passes through except the longest suffix that may begin a
 * stop string. The result does not depend on how the text arrives in pieces. */
#ifndef TD_TEXT_STOPS_H
#define TD_TEXT_STOPS_H

#include <stddef.h>

#include "base/strbuf.h"

typedef struct td_stops td_stops;

/* n strings of 1..256 bytes, n <= 16; copied. -EINVAL, -ENOMEM. */
int td_stops_new(const td_str *stops, size_t n, td_stops **ret_stops);
void td_stops_free(td_stops *s);
/* Append what is certain to out. Returns 1 when a stop string was completed: everything before it
 * is in out, the rest and all later text is dropped. The earliest completed one wins; among those
 * ending at the same byte, the longest. */
int td_stops_add(td_stops *s, const char *text, size_t n, td_strbuf *out);
/* End of the text: what was held back was text after all. */
void td_stops_finish(td_stops *s, td_strbuf *out);

#endif
