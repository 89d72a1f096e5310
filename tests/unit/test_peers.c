/* SPDX-License-Identifier: Apache-2.0 */
/* Promise: connections are counted per client: an IPv4 address, the /64 of an IPv6 address; what
 * was counted is given back. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "net/peers.h"
#include "base/banned.h"

static uint64_t v4(const char *text)
{
    struct sockaddr_in a = {.sin_family = AF_INET};
    assert_int_equal(inet_pton(AF_INET, text, &a.sin_addr), 1);
    return td_peer_key((const struct sockaddr *)&a);
}

static uint64_t v6(const char *text)
{
    struct sockaddr_in6 a = {.sin6_family = AF_INET6};
    assert_int_equal(inet_pton(AF_INET6, text, &a.sin6_addr), 1);
    return td_peer_key((const struct sockaddr *)&a);
}

static void keys(void **state)
{
    struct sockaddr local = {.sa_family = AF_UNIX};
    assert_int_equal(td_peer_key(&local), 0);
    assert_int_not_equal(v4("127.0.0.1"), 0);
    assert_int_not_equal(v4("0.0.0.0"), 0);
    assert_int_not_equal(v4("10.0.0.1"), v4("10.0.0.2"));
    assert_int_equal(v6("::ffff:10.0.0.1"), v4("10.0.0.1"));
    assert_int_equal(v6("2001:db8:1:2::1"), v6("2001:db8:1:2:ffff::9"));
    assert_int_not_equal(v6("2001:db8:1:2::1"), v6("2001:db8:1:3::1"));
    assert_int_not_equal(v6("::1"), 0);
    assert_int_not_equal(v6("::a00:1"), v4("10.0.0.1"));
}

static void counts(void **state)
{
    td_peers p;
    td_peers_init(&p);
    assert_int_equal(td_peers_add(&p, 0), 0);
    td_peers_drop(&p, 0);
    for (int round = 0; round < 3; round++) {
        for (uint64_t k = 1; k <= 2000; k++)
            assert_int_equal(td_peers_add(&p, k), 1);
        assert_int_equal(td_peers_add(&p, 7), 2);
        td_peers_drop(&p, 7);
        assert_int_equal(td_peers_add(&p, 7), 2);
        td_peers_drop(&p, 7);
        for (uint64_t k = 1; k <= 2000; k++)
            td_peers_drop(&p, k);
        assert_int_equal(p.counts.n, 0);
    }
    td_peers_add(&p, 5); /* freed by done */
    td_peers_done(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keys),
        cmocka_unit_test(counts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
