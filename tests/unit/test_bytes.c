/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: bytes.h never reads or writes past its end and remembers that it was asked to; list.h
 * survives removal in a loop; the clock only goes forward. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/list.h"
#include "base/banned.h"

static void test_reader(void **state)
{
    const uint8_t b[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    td_reader r;
    td_reader_init(&r, b, sizeof b);
    assert_int_equal(td_read_u8(&r), 1);
    assert_int_equal(td_read_u16(&r), 0x0302);
    assert_int_equal(td_read_u32(&r), 0x07060504);
    assert_int_equal(td_read_u64(&r), 0x0f0e0d0c0b0a0908ull);
    assert_false(r.failed);
    assert_int_equal(td_read_u8(&r), 0);
    assert_true(r.failed);
    /* after a failure nothing is read, even what would fit */
    td_reader_init(&r, b, 4);
    assert_null(td_read_bytes(&r, SIZE_MAX));
    assert_int_equal(td_read_u8(&r), 0);
    assert_true(r.failed);
}

static void test_writer(void **state)
{
    uint8_t b[8];
    td_writer w;
    memset(b, 0xee, sizeof b);
    td_writer_init(&w, b, 7);
    td_write_u32(&w, 0x04030201);
    td_write_u16(&w, 0x0605);
    td_write_u16(&w, 0x0807); /* one byte too many */
    assert_true(w.failed);
    assert_int_equal(b[6], 0xee);
    assert_memory_equal(b, "\1\2\3\4\5\6", 6);
}

struct node {
    td_list link;
    int v;
};

static void test_list(void **state)
{
    td_list head;
    struct node n[5];
    int sum = 0, left = 0;
    td_list_init(&head);
    assert_true(td_list_empty(&head));
    for (int i = 0; i < 5; i++) {
        n[i].v = i;
        td_list_add(&head, &n[i].link);
    }
    TD_LIST_FOR (it, &head) {
        struct node *x = TD_LIST_ENTRY(it, struct node, link);
        sum = sum * 10 + x->v;
        if (x->v % 2)
            td_list_del(&x->link);
    }
    assert_int_equal(sum, 1234);
    td_list_del(&n[1].link); /* twice is harmless */
    TD_LIST_FOR (it, &head)
        left = left * 10 + TD_LIST_ENTRY(it, struct node, link)->v;
    assert_int_equal(left, 24);
}

static void test_clock(void **state)
{
    uint64_t last = td_now_us();
    for (int i = 0; i < 1000; i++) {
        uint64_t now = td_now_us();
        assert_true(now >= last && now < last + 10 * TD_S);
        last = now;
    }
    assert_true(td_wall_s() > 1700000000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_reader), cmocka_unit_test(test_writer),
                                       cmocka_unit_test(test_list), cmocka_unit_test(test_clock)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
