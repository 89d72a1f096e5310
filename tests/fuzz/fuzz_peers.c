/* SPDX-License-Identifier: Apache-2.0 */
/* The allow-list and, of the same bytes, a network: what is accepted is unique, found again, and
 * written back as it was read. */
#include <stdlib.h>
#include <string.h>

#include "rpc/curve.h"
#include "rpc/network.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_roles(const td_peers *p)
{
    size_t n;
    const td_peer *router = td_peers_only(p, TD_ROLE_ROUTER, &n);
    char text[TD_CURVE_TEXT_BYTES];
    uint8_t key[TD_CURVE_KEY_BYTES];
    if ((router != NULL) != (n == 1))
        abort();
    if (!router)
        return;
    td_curve_text(router->key, text);
    if (strlen(text) != TD_CURVE_TEXT_BYTES - 1 || td_curve_parse(text, strlen(text), key) < 0 ||
        memcmp(key, router->key, sizeof key) != 0 || td_peers_find(p, key) != router ||
        !*router->name)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    td_peers *p = NULL;
    td_network network;
    td_err err = {0};
    char text[128];
    int r = td_peers_parse("peers", size ? (const char *)data : "", size, &p, &err);
    if ((r < 0) != (p == NULL) || (r < 0 && (err.code != r || !*err.text)))
        abort();
    if (p)
        check_roles(p);
    td_peers_free(p);
    size_t n = size < sizeof text ? size : sizeof text - 1;
    if (n)
        memcpy(text, data, n);
    text[n] = 0;
    if (td_network_parse(text, &network, &err) == 0 && (network.bits < 8 || network.bits > 128))
        abort();
    return 0;
}
