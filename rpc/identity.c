/* SPDX-License-Identifier: Apache-2.0 */
/* Who speaks on a session: the key that was proved in the CURVE handshake, on every message. A
 * routing id is what its owner says it is, so it alone proves nothing. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "proto/rpc.pb-c.h"
#include "rpc/rpc_int.h"
#include "base/banned.h"

static td_role role_of_hello(uint32_t role)
{
    switch (role) {
    case TANDEM__V1__ROLE__ROLE_PREFILL:
        return TD_ROLE_PREFILL;
    case TANDEM__V1__ROLE__ROLE_DECODE:
        return TD_ROLE_DECODE;
    default:
        return TD_ROLE_CLIENT;
    }
}

int td_session_authenticate(td_session *s, uint32_t hello_role, td_err *reterr_err)
{
    const char *from = s->rpc->from;
    s->generation = td_link_generation(s->rpc->c.link);
    if (td_link_identify(s->rpc->c.link, from, &s->peer) < 0)
        return td_err_set(reterr_err, -EACCES, "the key %s is not in curve-peers any more", from);
    if (s->peer.role != role_of_hello(hello_role))
        return td_err_set(reterr_err, -EACCES, "HELLO says %s, and the key is that of %s, a %s",
                          td_role_name(role_of_hello(hello_role)), s->peer.name,
                          td_role_name(s->peer.role));
    snprintf(s->user_id, sizeof s->user_id, "%s", from);
    s->has_peer = 1;
    return 0;
}

int td_session_is_from_peer(td_session *s)
{
    td_peer now;
    uint32_t generation = td_link_generation(s->rpc->c.link);
    if (strcmp(s->rpc->from, s->user_id) != 0)
        return 0;
    if (generation == s->generation)
        return 1;
    s->generation = generation;
    if (td_link_identify(s->rpc->c.link, s->user_id, &now) == 0 && now.role == s->peer.role)
        return 1;
    td_session_lose(s, TD_PENDING_CLOSE, "its key left curve-peers");
    return 0;
}
