/* SPDX-License-Identifier: Apache-2.0 */
/* Guards promises 3 and 6 on a private KV link: a message passes as its peer sent it, once, or not
 * at all. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "rpc/mac.h"
#include "rpc/network.h"

enum { N_PARTS = 3, LAST_BYTES = 1000 };

/* By tests/goldens/make_mac.py. */
static const char golden_key[] = "f70dcbe7f8dd65c4969ed749ba8c6a22";
static const char golden_part[] = "820118080706050403020125f78f8da258b55e80b3fc4ff0fc7e67";
#define GOLDEN_COUNTER 0x0102030405060708u

static td_bulk *door, *guest;
static td_mac *mac;
static uint8_t key[TD_MAC_KEY_BYTES], last[LAST_BYTES], golden[TD_MAC_PART_BYTES];

static int set_up(void **state)
{
    uint8_t ticket[16], prefill[16], decode[16];
    for (int i = 0; i < 16; i++)
        ticket[i] = (uint8_t)i;
    memset(prefill, 0xaa, 16);
    memset(decode, 0xdd, 16);
    td_mac_derive(ticket, prefill, decode, key);
    for (int i = 0; i < LAST_BYTES; i++)
        last[i] = (uint8_t)(i * 7);
    if (td_unhex(golden_part, golden, sizeof golden) < 0 || td_mac_new(&mac, NULL) < 0 ||
        td_bulk_bind("tcp://127.0.0.1:0", NULL, &door, NULL) < 0)
        return -1;
    return td_bulk_dial(td_bulk_endpoint(door), NULL, NULL, &guest, NULL);
}

static int tear_down(void **state)
{
    td_bulk_close(guest);
    td_bulk_close(door);
    td_mac_free(mac);
    return 0;
}

/* Send the parts and take them on the other side. */
static uint32_t cross(const td_bulk_part *parts, uint32_t n)
{
    td_bulk_peer from;
    uint32_t got = 0;
    int s = -EAGAIN, r = -EAGAIN;
    for (uint64_t end = td_now_us() + 5 * TD_S; r == -EAGAIN && td_now_us() < end; usleep(200)) {
        s = s == -EAGAIN ? td_bulk_send(guest, NULL, parts, n) : s;
        r = td_bulk_recv(door, &from, &got);
    }
    assert_int_equal(r, 0);
    return got;
}

static void fill(td_bulk_part parts[N_PARTS + 1], const uint8_t *part)
{
    parts[0] = (td_bulk_part){.data = "preamblepreamblepreamble", .n = 24};
    parts[1] = (td_bulk_part){.data = "", .n = 0};
    parts[2] = (td_bulk_part){.data = last, .n = sizeof last};
    parts[3] = (td_bulk_part){.data = part, .n = TD_MAC_PART_BYTES};
}

static int check(const td_bulk_part *parts, uint32_t n, td_mac_way way, uint64_t *counter)
{
    uint32_t got = cross(parts, n);
    return td_mac_check(mac, key, way, door, got, counter);
}

static void test_golden(void **state)
{
    char hex[33];
    td_bulk_part parts[N_PARTS + 1];
    uint64_t counter = GOLDEN_COUNTER - 1;
    assert_string_equal(td_hex(key, 16, hex), golden_key);
    fill(parts, golden);
    assert_int_equal(check(parts, N_PARTS + 1, TD_MAC_PUSH, &counter), 0);
    assert_true(counter == GOLDEN_COUNTER);
    /* the same once more is a repetition */
    assert_int_equal(check(parts, N_PARTS + 1, TD_MAC_PUSH, &counter), -EBADMSG);
}

/* Every way to change a message is seen, and none moves the counter. */
static void test_changes(void **state)
{
    td_bulk_part good[N_PARTS + 1], p[N_PARTS + 2];
    uint8_t bad_part[TD_MAC_PART_BYTES], bad_last[LAST_BYTES];
    uint64_t counter = 0;
    fill(good, golden);
    assert_int_equal(check(good, N_PARTS + 1, TD_MAC_ACK, &counter), -EBADMSG); /* sent back */
    assert_int_equal(check(good, N_PARTS, TD_MAC_PUSH, &counter), -EBADMSG);    /* cut off */
    assert_int_equal(check(good, 1, TD_MAC_PUSH, &counter), -EBADMSG);
    for (size_t i = 0; i < sizeof bad_part; i++) {
        memcpy(bad_part, golden, sizeof bad_part);
        bad_part[i] ^= 0x10;
        fill(p, bad_part);
        assert_int_equal(check(p, N_PARTS + 1, TD_MAC_PUSH, &counter), -EBADMSG);
    }
    memcpy(bad_last, last, sizeof last);
    bad_last[999] ^= 1;
    fill(p, golden);
    p[2].data = bad_last;
    assert_int_equal(check(p, N_PARTS + 1, TD_MAC_PUSH, &counter), -EBADMSG);
    fill(p, golden); /* the same bytes, cut elsewhere */
    p[1] = (td_bulk_part){.data = last, .n = 1};
    p[2] = (td_bulk_part){.data = last + 1, .n = sizeof last - 1};
    assert_int_equal(check(p, N_PARTS + 1, TD_MAC_PUSH, &counter), -EBADMSG);
    fill(p, golden); /* one part more */
    p[4] = p[3];
    p[3] = (td_bulk_part){.data = "", .n = 0};
    assert_int_equal(check(p, N_PARTS + 2, TD_MAC_PUSH, &counter), -EBADMSG);
    assert_true(counter == 0);
    key[0] ^= 1; /* another ticket */
    assert_int_equal(check(good, N_PARTS + 1, TD_MAC_PUSH, &counter), -EBADMSG);
    key[0] ^= 1;
    assert_int_equal(check(good, N_PARTS + 1, TD_MAC_PUSH, &counter), 0);
}

/* What is signed passes, and no nonce comes twice, also from a new td_mac. */
static void test_signed(void **state)
{
    td_bulk_part parts[N_PARTS + 1];
    uint8_t part[TD_MAC_PART_BYTES];
    uint64_t counter = 0;
    fill(parts, part);
    for (int i = 0; i < 5; i++) {
        td_mac *m;
        assert_int_equal(td_mac_new(&m, NULL), 0);
        for (int j = 0; j < 3; j++) {
            assert_int_equal(td_mac_sign(m, key, TD_MAC_PUSH, parts, N_PARTS, part), 0);
            assert_int_equal(check(parts, N_PARTS + 1, TD_MAC_PUSH, &counter), 0);
        }
        td_mac_free(m);
    }
}

static void test_networks(void **state)
{
    static const struct {
        const char *text, *says;
    } bad[] = {{"10.0.0.0", "ADDRESS/BITS"},
               {"", "ADDRESS/BITS"},
               {"/8", "ADDRESS/BITS"},
               {"10.0.0.0/", "ADDRESS/BITS"},
               {"10.0.0.0/33", "ADDRESS/BITS"},
               {"10.0.0.0/+8", "ADDRESS/BITS"},
               {"host/8", "ADDRESS/BITS"},
               {"10.0.0.0/8x", "ADDRESS/BITS"},
               {"0.0.0.0/0", "at least /8"},
               {"::/0", "at least /8"},
               {"10.0.0.1/8", "behind the prefix"},
               {"fd00::1/64", "behind the prefix"}};
    static const struct {
        const char *network, *address;
        int has;
    } t[] = {{"10.0.0.0/8", "10.255.0.1", 1},      {"10.0.0.0/8", "11.0.0.1", 0},
             {"192.0.2.128/25", "192.0.2.129", 1}, {"192.0.2.128/25", "192.0.2.127", 0},
             {"192.0.2.1/32", "192.0.2.1", 1},     {"192.0.2.1/32", "192.0.2.0", 0},
             {"fd00:1::/32", "fd00:1:2::3", 1},    {"fd00:1::/32", "fd00:2::3", 0},
             {"10.0.0.0/8", "::ffff:10.0.0.1", 0}, {"10.0.0.0/8", "", 0},
             {"fd00::/8", "10.0.0.1", 0},          {"10.0.0.0/8", "10.0.0.1:80", 0}};
    td_network n;
    for (size_t i = 0; i < TD_ARRAY_LEN(bad); i++) {
        td_err err = {0};
        assert_int_equal(td_network_parse(bad[i].text, &n, &err), -EINVAL);
        assert_non_null(strstr(err.text, bad[i].says));
    }
    for (size_t i = 0; i < TD_ARRAY_LEN(t); i++) {
        assert_int_equal(td_network_parse(t[i].network, &n, NULL), 0);
        assert_int_equal(td_network_has(&n, t[i].address), t[i].has);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden), cmocka_unit_test(test_changes),
        cmocka_unit_test(test_signed), cmocka_unit_test(test_networks)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
