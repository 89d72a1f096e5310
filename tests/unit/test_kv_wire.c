/* SPDX-License-Identifier: Apache-2.0 */
/* The wire form of a KV segment (architecture, section 3b): frames 1, 2, 3..n concatenated are one
 * valid KvSegment for any protobuf implementation. Judges: protobuf-c here, Google's Python package
 * when it is installed. And: nothing of a wrong size is unpacked, and what protobuf-c allocates for
 * a hostile body is bounded. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "handoff/plan.h"
#include "handoff/wire.h"
#include "proto/kv.pb-c.h"

static void fill_bytes(uint8_t *p, size_t n, uint8_t from)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(from + i);
}

static void make_segment(td_wire_segment *s)
{
    memset(s, 0, sizeof *s);
    fill_bytes(s->key.id, 16, 1);
    s->key.attempt = 2;
    s->key.generation = 300;
    fill_bytes(s->key.prefill_epoch, 16, 20);
    fill_bytes(s->key.decode_epoch, 16, 40);
    fill_bytes(s->terms.model_hash, 32, 60);
    fill_bytes(s->terms.profile_id, 16, 100);
    fill_bytes(s->terms.layout_hash, 16, 120);
    s->group = 7;
    s->n_runs = 2;
    s->runs[0] = (td_kv_run){.block = 5, .rows = 64, .crc = 0xdeadbeef, .has_chain = 1};
    fill_bytes(s->runs[0].chain, 16, 200);
    s->runs[1] = (td_kv_run){.block = 130, .rows = 17, .crc = 1};
}

/* Frames 1, 2 and payload one behind the other, as they would leave. */
static uint8_t *concatenate(const td_wire_segment *s, size_t payload, size_t *ret_n,
                            size_t *ret_head)
{
    uint8_t *out = malloc(TD_SEGMENT_HEAD_MAX + TD_PAYLOAD_TAG_BYTES + payload);
    int n = td_wire_pack_segment(s, out, TD_SEGMENT_HEAD_MAX);
    assert_true(n > 0);
    td_wire_payload_tag(payload, out + n);
    for (size_t i = 0; i < payload; i++)
        out[(size_t)n + TD_PAYLOAD_TAG_BYTES + i] = (uint8_t)(i * 7 + 3);
    *ret_head = (size_t)n;
    *ret_n = (size_t)n + TD_PAYLOAD_TAG_BYTES + payload;
    return out;
}

static void test_one_message(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 127, 128, 16384, 958464, 3000000};
    td_wire_segment s;
    make_segment(&s);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t n, head;
        uint8_t *bytes = concatenate(&s, sizes[i], &n, &head);
        Tandem__V1__KvSegment *m = tandem__v1__kv_segment__unpack(NULL, n, bytes);
        assert_non_null(m);
        assert_int_equal(m->has_payload, 1);
        assert_int_equal(m->payload.len, sizes[i]);
        assert_memory_equal(m->payload.data, bytes + head + TD_PAYLOAD_TAG_BYTES, sizes[i]);
        assert_int_equal(m->n_runs, 2);
        assert_int_equal(m->runs[1]->block, 130);
        tandem__v1__kv_segment__free_unpacked(m, NULL);
        free(bytes);
    }
}

static void test_python_agrees(void **state)
{
    (void)state;
    td_wire_segment s;
    size_t n, head;
    char path[] = "/tmp/tandem-kv-XXXXXX", command[1024], line[2048] = "";
    make_segment(&s);
    uint8_t *bytes = concatenate(&s, 100000, &n, &head);
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, bytes, n), (ssize_t)n);
    close(fd);
    const char *python = getenv("TD_PYTHON");
    snprintf(command, sizeof command, "%s %s/tests/tools/check_kv_wire.py %s",
             python ? python : "python3", TD_SOURCE_DIR, path);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    char *got = fgets(line, sizeof line, f);
    int status = pclose(f);
    unlink(path);
    uint32_t sum = 0;
    for (size_t i = head + TD_PAYLOAD_TAG_BYTES; i < n; i++)
        sum += bytes[i];
    free(bytes);
    if (WIFEXITED(status) && (WEXITSTATUS(status) == 77 || WEXITSTATUS(status) == 127)) {
        printf("SKIP python: python3-protobuf or protoc is not installed\n");
        skip();
    }
    assert_int_equal(status, 0);
    assert_non_null(got);
    char want[2048];
    snprintf(want, sizeof want,
             "0102030405060708090a0b0c0d0e0f10 2 300 1415161718191a1b1c1d1e1f20212223 "
             "28292a2b2c2d2e2f3031323334353637 "
             "3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b "
             "6465666768696a6b6c6d6e6f70717273 "
             "78797a7b7c7d7e7f8081828384858687 7 "
             "5:64:deadbeef:c8c9cacbcccdcecfd0d1d2d3d4d5d6d7,130:17:00000001:- 100000 %u\n",
             sum);
    assert_string_equal(line, want);
}

static void test_tag(void **state)
{
    (void)state;
    uint8_t tag[TD_PAYLOAD_TAG_BYTES];
    td_wire_payload_tag(958464, tag);
    static const uint8_t want[] = {0x7a, 0x80, 0xc0, 0xba, 0x80, 0x00};
    assert_memory_equal(tag, want, sizeof want);
    assert_int_equal(td_wire_check_tag(tag, 6, 958464), 0);
    assert_true(td_wire_check_tag(tag, 6, 958465) < 0);
    assert_true(td_wire_check_tag(tag, 5, 958464) < 0);
    static const uint8_t minimal[] = {0x7a, 0x80, 0xc0, 0x3a};
    assert_true(td_wire_check_tag(minimal, sizeof minimal, 958464) < 0);
}

static void test_round_trips(void **state)
{
    (void)state;
    static td_wire_segment s, t;
    uint8_t buf[4096];
    td_arena a;
    td_arena_init(&a, 1 << 20);
    make_segment(&s);
    int n = td_wire_pack_segment(&s, buf, sizeof buf);
    assert_int_equal(td_wire_unpack_segment(buf, (size_t)n, &a, &t), 0);
    assert_memory_equal(&s, &t, sizeof s);
    for (int cut = 0; cut < n; cut++)
        (void)td_wire_unpack_segment(buf, (size_t)cut, &a, &t); /* no crash; most are refused */

    s.shared = 1; /* its runs lie in a shared pool */
    s.pool = 1ull << 63;
    s.runs[0].offset = 1ull << 45;
    s.runs[0].length = 958464;
    s.runs[1].length = 17;
    n = td_wire_pack_segment(&s, buf, sizeof buf);
    memset(&t, 0, sizeof t);
    assert_int_equal(td_wire_unpack_segment(buf, (size_t)n, &a, &t), 0);
    assert_memory_equal(&s, &t, sizeof s);
    s.shared = 0;

    uint32_t digests[3] = {1, 2, 3}, choices[2] = {0, 4}, ids[2] = {9, 8};
    td_wire_commit c = {.key = s.key,
                        .terms = s.terms,
                        .n_tokens = 177,
                        .n_digests = 3,
                        .n_first = 2,
                        .digests = digests,
                        .choices = choices,
                        .ids = ids},
                   d;
    n = td_wire_pack_commit(&c, buf, sizeof buf);
    assert_int_equal(td_wire_unpack_commit(buf, (size_t)n, &a, &d), 0);
    assert_true(d.n_tokens == 177 && d.n_digests == 3 && d.digests[2] == 3 && d.n_first == 2 &&
                d.choices[1] == 4 && d.ids[1] == 8);
    assert_memory_equal(&d.key, &c.key, sizeof c.key);

    td_wire_ack k = {.key = s.key,
                     .received_bytes = 1ull << 40,
                     .state = TD_ACK_FAILED,
                     .code = 15,
                     .reason = "crc"},
                l;
    n = td_wire_pack_ack(&k, buf, sizeof buf);
    assert_int_equal(td_wire_unpack_ack(buf, (size_t)n, &a, &l), 0);
    assert_true(l.received_bytes == 1ull << 40 && l.state == TD_ACK_FAILED && l.code == 15 &&
                strcmp(l.reason, "crc") == 0);

    td_wire_pool p = {.pool = 7, .bytes = 1ull << 40}, q;
    fill_bytes(p.nonce, 32, 1);
    fill_bytes(p.prefill_epoch, 16, 2);
    fill_bytes(p.decode_epoch, 16, 3);
    fill_bytes(p.layout_hash, 16, 4);
    n = td_wire_pack_pool(&p, buf, sizeof buf);
    assert_true(n > 0 && n <= TD_POOL_BODY_MAX);
    assert_int_equal(td_wire_unpack_pool(buf, (size_t)n, &a, &q), 0);
    assert_memory_equal(&p, &q, sizeof p);
    for (int cut = 0; cut < n; cut++) /* every field is required */
        assert_true(td_wire_unpack_pool(buf, (size_t)cut, &a, &q) < 0);
    buf[1] = 31; /* a nonce that is too short takes the next field's first byte for its end */
    assert_true(td_wire_unpack_pool(buf, (size_t)n, &a, &q) < 0);

    td_wire_pool_ack r = {.code = 9, .reason = "line\nbreak"}, u;
    n = td_wire_pack_pool_ack(&r, buf, sizeof buf);
    assert_int_equal(td_wire_unpack_pool_ack(buf, (size_t)n, &a, &u), 0);
    assert_true(u.code == 9 && strcmp(u.reason, "line_break") == 0);
    td_arena_done(&a);
}

/* Offset and length come with every run of a shared pool, and with no other. */
static void test_half_shared(void **state)
{
    (void)state;
    static td_wire_segment t;
    uint8_t buf[512], x[32] = {0};
    ProtobufCBinaryData b16 = {16, x}, b32 = {32, x};
    Tandem__V1__KvSegment m = TANDEM__V1__KV_SEGMENT__INIT;
    Tandem__V1__KvRun run = TANDEM__V1__KV_RUN__INIT, *runs[1] = {&run};
    td_arena a;
    td_arena_init(&a, 1 << 20);
    m.ticket = m.prefill_epoch = m.decode_epoch = m.profile_id = m.layout_hash = b16;
    m.model_hash = b32;
    m.n_runs = 1;
    m.runs = runs;
    for (int bits = 0; bits < 8; bits++) {
        m.has_pool = bits & 1;
        run.has_offset = (bits & 2) != 0;
        run.has_length = (bits & 4) != 0;
        size_t n = tandem__v1__kv_segment__pack(&m, buf);
        int ok = td_wire_unpack_segment(buf, n, &a, &t) == 0;
        assert_int_equal(ok, bits == 0 || bits == 7);
    }
    td_arena_done(&a);
}

static void test_hostile_bodies(void **state)
{
    (void)state;
    static td_wire_segment t;
    static uint8_t big[TD_SEGMENT_HEAD_MAX + 1];
    td_arena a;
    td_arena_init(&a, 1 << 20);
    /* ids and hashes of a wrong length */
    Tandem__V1__KvSegment m = TANDEM__V1__KV_SEGMENT__INIT;
    uint8_t buf[512], x[40] = {0};
    ProtobufCBinaryData b15 = {15, x}, b16 = {16, x}, b32 = {32, x};
    Tandem__V1__KvRun run = TANDEM__V1__KV_RUN__INIT, *runs[1] = {&run};
    m.ticket = b15;
    m.prefill_epoch = m.decode_epoch = m.profile_id = m.layout_hash = b16;
    m.model_hash = b32;
    m.n_runs = 1;
    m.runs = runs;
    size_t n = tandem__v1__kv_segment__pack(&m, buf);
    assert_true(td_wire_unpack_segment(buf, n, &a, &t) < 0);
    m.ticket = b16;
    n = tandem__v1__kv_segment__pack(&m, buf);
    assert_int_equal(td_wire_unpack_segment(buf, n, &a, &t), 0);
    /* a payload inside frame 1, no runs, too large */
    m.has_payload = 1;
    m.payload = b16;
    n = tandem__v1__kv_segment__pack(&m, buf);
    assert_true(td_wire_unpack_segment(buf, n, &a, &t) < 0);
    m.has_payload = 0;
    m.n_runs = 0;
    n = tandem__v1__kv_segment__pack(&m, buf);
    assert_true(td_wire_unpack_segment(buf, n, &a, &t) < 0);
    assert_true(td_wire_unpack_segment(big, sizeof big, &a, &t) < 0);
    /* 32 Ki empty runs in 64 KiB: the arena's limit holds, whatever protobuf-c would like to
     * allocate */
    for (size_t i = 0; i + 1 < TD_SEGMENT_HEAD_MAX; i += 2)
        big[i] = 10 << 3 | 2;
    td_arena_reset(&a);
    assert_true(td_wire_unpack_segment(big, TD_SEGMENT_HEAD_MAX, &a, &t) < 0);
    td_arena_done(&a);
}

/* The geometry both ends compute: every row once, in place, and never past the block. */
static void test_plan(void **state)
{
    (void)state;
    td_handoff_plan p;
    uint32_t t, b, rows;
    assert_int_equal(td_plan_init(&p, 130, 3, NULL, NULL, 0), 0);
    assert_true(p.n_timelines == 1 && p.n_choices == 3 && p.n_blocks == 3 && p.n_tokens == 130);
    td_plan_block(&p, 2, &t, &b, &rows);
    assert_true(t == 0 && b == 2 && rows == 2);
    const uint32_t choices[] = {1, 3};
    const size_t emitted[] = {1, 64};
    assert_int_equal(td_plan_init(&p, 128, 4, choices, emitted, 2), 0);
    assert_true(p.n_timelines == 2 && p.n_choices == 2 && p.n_blocks == 2 + 3 &&
                p.n_tokens == 128 + 191);
    td_plan_block(&p, 4, &t, &b, &rows);
    assert_true(t == 1 && b == 2 && rows == 63);
    const size_t none[] = {0, 64};
    assert_true(td_plan_init(&p, 128, 4, choices, none, 2) < 0);
    assert_true(td_plan_init(&p, 0, 1, NULL, NULL, 0) < 0);
    assert_true(td_plan_init(&p, 1, TD_CHOICES_MAX + 1, NULL, NULL, 0) < 0);

    td_kv_group g = {.n_layers = 3, .offset = 1000, .bytes = 3 * 64 * 10};
    uint64_t offset, bytes;
    assert_int_equal(td_run_frames(&g, 64), 1);
    td_run_frame(&g, 64, 0, &offset, &bytes);
    assert_true(offset == 1000 && bytes == 1920);
    assert_int_equal(td_run_frames(&g, 5), 3);
    td_run_frame(&g, 5, 2, &offset, &bytes);
    assert_true(offset == 1000 + 2 * 640 && bytes == 50);
    assert_int_equal(td_run_bytes(&g, 5), 150);

    /* rows of FP8 travel with their scales, which lie behind all 64 rows of a layer */
    td_kv_group f8 = {.n_layers = 3, .offset = 1000, .bytes = 3 * 64 * 10, .scale_bytes = 64 * 4};
    assert_int_equal(td_run_frames(&f8, 64), 1);
    td_run_frame(&f8, 64, 0, &offset, &bytes);
    assert_true(offset == 1000 && bytes == 1920);
    assert_int_equal(td_run_frames(&f8, 5), 6);
    td_run_frame(&f8, 5, 4, &offset, &bytes);
    assert_true(offset == 1000 + 2 * 640 && bytes == 5 * 6);
    td_run_frame(&f8, 5, 5, &offset, &bytes);
    assert_true(offset == 1000 + 2 * 640 + 64 * 6 && bytes == 5 * 4);
    assert_int_equal(td_run_bytes(&f8, 5), 150);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_message), cmocka_unit_test(test_python_agrees),
        cmocka_unit_test(test_tag),         cmocka_unit_test(test_round_trips),
        cmocka_unit_test(test_half_shared), cmocka_unit_test(test_hostile_bodies),
        cmocka_unit_test(test_plan),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
