/* SPDX-License-Identifier: Apache-2.0 */
/* The wire contract (proto/): bytes made by Google's Python protobuf are read, hold the values of
 * their .json, and are written again bit for bit; what is cut, lies or lacks a field is refused;
 * rules that every .proto obeys. */
#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "base/bug.h"
#include "base/file.h"
#include "base/hash.h"
#include "proto/common.pb-c.h"
#include "proto/engine.pb-c.h"
#include "proto/inference.pb-c.h"
#include "proto/kv.pb-c.h"
#include "proto/rpc.pb-c.h"
#include "rpc/codec.h"
#include "rpc/frame.h"

#define ROW(x) &tandem__v1__##x##__descriptor
static const ProtobufCMessageDescriptor *const all[] = {
    /* common */
    ROW(logit_bias),
    ROW(sampling_params),
    ROW(emitted),
    ROW(request),
    ROW(top_logprob),
    ROW(token_run),
    ROW(load),
    ROW(usage),
    /* rpc */
    ROW(hello),
    ROW(welcome),
    ROW(metadata),
    ROW(call),
    ROW(data),
    ROW(batch_item),
    ROW(batch),
    ROW(credit),
    ROW(cancel),
    ROW(status),
    ROW(ping),
    ROW(goaway),
    /* engine */
    ROW(ticket),
    ROW(reserve_request),
    ROW(decode_event),
    ROW(prefill_request),
    ROW(prompt_logprobs),
    ROW(prefill_reply),
    ROW(abort_request),
    ROW(abort_reply),
    ROW(loads_request),
    ROW(loads_reply),
    ROW(model_info_request),
    ROW(model_info_reply),
    ROW(flush_request),
    ROW(flush_reply),
    ROW(drain_request),
    ROW(drain_reply),
    /* inference */
    ROW(chat_message),
    ROW(generate_request),
    ROW(generate_reply),
    ROW(models_request),
    ROW(models_reply),
    ROW(health_request),
    ROW(health_reply),
    /* kv */
    ROW(kv_run),
    ROW(kv_segment),
    ROW(kv_commit),
    ROW(kv_ack),
    ROW(kv_pool),
    ROW(kv_pool_ack),
};

typedef struct bytes {
    char *p;
    size_t n;
} bytes;

static bytes read_file(const char *dir, const char *name)
{
    char path[500];
    bytes b;
    td_err err;
    snprintf(path, sizeof path, "%s/%s/%s", TD_SOURCE_DIR, dir, name);
    if (td_file_read(path, 1 << 20, &b.p, &b.n, &err) < 0)
        fail_msg("%s: run tests/goldens/make_wire.py", err.text);
    return b;
}

static bytes golden(const ProtobufCMessageDescriptor *d, const char *kind)
{
    char name[200];
    snprintf(name, sizeof name, "%s.%s", d->short_name, kind);
    return read_file("tests/goldens/wire", name);
}

/* A copy of exactly n bytes, so that the sanitizer sees a read past them. */
static int unpack(td_codec *c, const ProtobufCMessageDescriptor *d, const void *p, size_t n,
                  ProtobufCMessage **ret)
{
    uint8_t *exact = malloc(n ? n : 1);
    td_err err = {.code = 0};
    memcpy(exact, p, n);
    int r = td_codec_unpack(c, d, exact, n, ret, &err);
    free(exact);
    assert_int_equal(r != 0, err.text[0] != 0);
    return r;
}

/* ---- values ---- */

static void check_message(const ProtobufCMessage *m, const json_t *want);

static void check_value(const ProtobufCFieldDescriptor *f, const void *v, const json_t *want)
{
    const ProtobufCBinaryData *b = v;
    char *hex;
    switch (f->type) {
    case PROTOBUF_C_TYPE_UINT32:
    case PROTOBUF_C_TYPE_FIXED32:
        assert_int_equal(*(const uint32_t *)v, json_integer_value(want));
        break;
    case PROTOBUF_C_TYPE_INT32:
    case PROTOBUF_C_TYPE_ENUM:
        assert_int_equal(*(const int32_t *)v, json_integer_value(want));
        break;
    case PROTOBUF_C_TYPE_UINT64:
        assert_true(*(const uint64_t *)v == strtoull(json_string_value(want), NULL, 10));
        break;
    case PROTOBUF_C_TYPE_FLOAT:
        assert_true(*(const float *)v == (float)json_real_value(want));
        break;
    case PROTOBUF_C_TYPE_BOOL:
        assert_int_equal(*(const protobuf_c_boolean *)v, json_is_true(want));
        break;
    case PROTOBUF_C_TYPE_STRING:
        assert_string_equal(*(char *const *)v, json_string_value(want));
        break;
    case PROTOBUF_C_TYPE_BYTES:
        hex = malloc(2 * b->len + 1);
        assert_string_equal(td_hex(b->data, b->len, hex), json_string_value(want));
        free(hex);
        break;
    case PROTOBUF_C_TYPE_MESSAGE:
        check_message(*(ProtobufCMessage *const *)v, want);
        break;
    default:
        fail_msg("%s: type %d has no comparison", f->name, f->type);
    }
}

static size_t size_of(const ProtobufCFieldDescriptor *f)
{
    switch (f->type) {
    case PROTOBUF_C_TYPE_UINT64:
        return 8;
    case PROTOBUF_C_TYPE_BYTES:
        return sizeof(ProtobufCBinaryData);
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_MESSAGE:
        return sizeof(void *);
    default:
        return 4;
    }
}

static int is_present(const ProtobufCMessage *m, const ProtobufCFieldDescriptor *f)
{
    const char *base = (const char *)m;
    if (f->label == PROTOBUF_C_LABEL_REQUIRED)
        return 1;
    if (f->label == PROTOBUF_C_LABEL_REPEATED)
        return *(const size_t *)(base + f->quantifier_offset) > 0;
    if (f->type == PROTOBUF_C_TYPE_MESSAGE || f->type == PROTOBUF_C_TYPE_STRING)
        return *(void *const *)(base + f->offset) &&
               *(void *const *)(base + f->offset) != f->default_value;
    return *(const protobuf_c_boolean *)(base + f->quantifier_offset);
}

static void check_field(const ProtobufCMessage *m, const ProtobufCFieldDescriptor *f,
                        const json_t *want)
{
    const char *base = (const char *)m;
    assert_int_equal(is_present(m, f), want != NULL);
    if (!want)
        return;
    if (f->label != PROTOBUF_C_LABEL_REPEATED) {
        check_value(f, base + f->offset, want);
        return;
    }
    size_t n = *(const size_t *)(base + f->quantifier_offset);
    assert_int_equal(n, json_array_size(want));
    for (size_t i = 0; i < n; i++)
        check_value(f, *(char *const *)(base + f->offset) + i * size_of(f),
                    json_array_get(want, i));
}

static void check_message(const ProtobufCMessage *m, const json_t *want)
{
    const ProtobufCMessageDescriptor *d = m->descriptor;
    size_t n = 0;
    for (unsigned i = 0; i < d->n_fields; i++) {
        const json_t *w = json_object_get(want, d->fields[i].name);
        n += w != NULL;
        check_field(m, &d->fields[i], w);
    }
    assert_int_equal(n, json_object_size(want)); /* nothing in the golden that we don't know */
}

/* ---- tests ---- */

/* Promise: the wire form is what any protobuf implementation says it is. */
static void test_goldens(void **state)
{
    static const char *const kinds[] = {"full", "min"};
    td_codec c;
    td_codec_init(&c);
    for (size_t i = 0; i < TD_ARRAY_LEN(all) * 2; i++) {
        const ProtobufCMessageDescriptor *d = all[i / 2];
        char name[20];
        snprintf(name, sizeof name, "%s.bin", kinds[i % 2]);
        bytes b = golden(d, name);
        snprintf(name, sizeof name, "%s.json", kinds[i % 2]);
        bytes text = golden(d, name);
        json_t *want = json_loadb(text.p, text.n, 0, NULL);
        assert_non_null(want);
        ProtobufCMessage *m;
        assert_int_equal(unpack(&c, d, b.p, b.n, &m), 0);
        check_message(m, want);
        assert_int_equal(protobuf_c_message_get_packed_size(m), b.n);
        uint8_t *again = malloc(b.n ? b.n : 1);
        protobuf_c_message_pack(m, again);
        assert_memory_equal(again, b.p, b.n);
        free(again);
        json_decref(want);
        free(b.p);
        free(text.p);
    }
    td_codec_done(&c);
}

/* Promise: whatever the place of the cut, no crash and no half message: a message of required
 * fields only is refused at every strict prefix; a full one is refused unless the cut falls between
 * two fields and leaves all required ones. */
static void test_cut_everywhere(void **state)
{
    td_codec c;
    ProtobufCMessage *m;
    td_codec_init(&c);
    for (size_t i = 0; i < TD_ARRAY_LEN(all); i++) {
        bytes b = golden(all[i], "min.bin");
        for (size_t n = 0; n < b.n; n++)
            assert_int_equal(unpack(&c, all[i], b.p, n, &m), -EBADMSG);
        free(b.p);
        b = golden(all[i], "full.bin");
        for (size_t n = 0; n < b.n; n++) {
            int r = unpack(&c, all[i], b.p, n, &m);
            assert_true(r == 0 || r == -EBADMSG);
            if (r == 0)
                assert_int_equal(protobuf_c_message_get_packed_size(m), n);
        }
        free(b.p);
    }
    td_codec_done(&c);
}

/* Promise: one byte of noise anywhere never crashes and never reads past the end (sanitizers
 * judge). */
static void test_noise(void **state)
{
    td_codec c;
    ProtobufCMessage *m;
    td_codec_init(&c);
    for (size_t i = 0; i < TD_ARRAY_LEN(all); i++) {
        bytes b = golden(all[i], "full.bin");
        for (size_t at = 0; at < b.n; at++)
            for (int bit = 0; bit < 8; bit++) {
                b.p[at] ^= (char)(1 << bit);
                unpack(&c, all[i], b.p, b.n, &m);
                b.p[at] ^= (char)(1 << bit);
            }
        free(b.p);
    }
    td_codec_done(&c);
}

static uint64_t varint(const uint8_t **p)
{
    uint64_t v = 0;
    for (unsigned shift = 0;; shift += 7) {
        v |= (uint64_t)(**p & 0x7f) << shift;
        if (!(*(*p)++ & 0x80))
            return v;
    }
}

/* Length of the field at p (of a good message). */
static size_t field_bytes(const uint8_t *p)
{
    const uint8_t *q = p;
    uint64_t tag = varint(&q), n;
    switch (tag & 7) {
    case 0:
        varint(&q);
        break;
    case 1:
        q += 8;
        break;
    case 5:
        q += 4;
        break;
    default:
        n = varint(&q);
        q += n;
    }
    return (size_t)(q - p);
}

/* Promise: each required field alone is missed. */
static void test_required_missing(void **state)
{
    td_codec c;
    ProtobufCMessage *m;
    unsigned n_checked = 0;
    td_codec_init(&c);
    for (size_t i = 0; i < TD_ARRAY_LEN(all); i++) {
        bytes b = golden(all[i], "min.bin");
        for (size_t at = 0, n; at < b.n; at += n) {
            char *less = malloc(b.n);
            n = field_bytes((uint8_t *)b.p + at);
            memcpy(less, b.p, at);
            memcpy(less + at, b.p + at + n, b.n - at - n);
            assert_int_equal(unpack(&c, all[i], less, b.n - n, &m), -EBADMSG);
            n_checked++;
            free(less);
        }
        free(b.p);
    }
    assert_true(n_checked > 60);
    td_codec_done(&c);
}

static int unpack_text(td_codec *c, const ProtobufCMessageDescriptor *d, const char *wire, size_t n)
{
    ProtobufCMessage *m;
    return unpack(c, d, wire, n, &m);
}

/* Promise: unknown fields are skipped and counted, up to a bound; enums, strings and nested lengths
 * are checked. */
static void test_lies(void **state)
{
    td_codec c;
    td_codec_init(&c);
    char many[3 * (TD_CODEC_UNKNOWN_MAX + 1)];
    for (size_t i = 0; i < sizeof many; i += 3)
        memcpy(many + i, "\xf8\x07\x01", 3); /* field 127 */
    assert_int_equal(unpack_text(&c, ROW(drain_reply), many, sizeof many - 3), 0);
    assert_int_equal(c.unknown_fields, TD_CODEC_UNKNOWN_MAX);
    assert_int_equal(unpack_text(&c, ROW(drain_reply), many, sizeof many), -EBADMSG);
    assert_int_equal(unpack_text(&c, ROW(health_reply), "\x08\x03", 2), 0);
    assert_int_equal(unpack_text(&c, ROW(health_reply), "\x08\x04", 2),
                     -EBADMSG); /* no such enum value */
    assert_int_equal(unpack_text(&c, ROW(health_request), "\x0a\x02xy", 4), 0);
    assert_int_equal(unpack_text(&c, ROW(health_request), "\x0a\x02x\0", 4), -EBADMSG); /* NUL */
    assert_int_equal(unpack_text(&c, ROW(health_request), "\x0a\x02\xc3(", 4),
                     -EBADMSG); /* not UTF-8 */
    assert_int_equal(unpack_text(&c, ROW(loads_reply), "\x0a\x05\x08\x01", 4),
                     -EBADMSG); /* longer than its parent */
    assert_int_equal(unpack_text(&c, ROW(loads_reply), "\x0b\x0c", 2), -EBADMSG); /* a group */
    assert_int_equal(
        unpack_text(&c, ROW(load), "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 12),
        -EBADMSG);
    td_codec_done(&c);
}

/* Bug guarded: protobuf-c makes 72 MiB of 1 MiB of empty sub-messages; the budget stops it early.
 * Caps come first. */
static void test_amplification(void **state)
{
    td_codec c;
    td_codec_init(&c);
    size_t n = 1 << 20;
    char *p = malloc(n);
    for (size_t i = 0; i < n; i += 2)
        memcpy(p + i, "\x32\x00", 2); /* top_p is a float: wrong wire type */
    assert_int_equal(unpack_text(&c, ROW(generate_request), p, n), -EBADMSG);
    for (size_t i = 0; i < n; i += 2)
        memcpy(p + i, "\x52\x00", 2); /* empty stop strings */
    assert_int_equal(unpack_text(&c, ROW(generate_request), p, n), -E2BIG);
    assert_true(c.arena.used_bytes <= 6 * n + TD_CODEC_CONST_BYTES);
    memset(p, 0, n);
    assert_int_equal(unpack_text(&c, ROW(ping), p, (64 << 10) + 1), -E2BIG);
    free(p);
    td_codec_done(&c);
}

/* Bug guarded: the budget must not refuse what workers really send: many small entries at the
 * largest size in use. */
static void test_budget_fits(void **state)
{
    td_codec c;
    td_codec_init(&c);
    enum { N = 20000 };
    Tandem__V1__PromptLogprobs p = TANDEM__V1__PROMPT_LOGPROBS__INIT;
    Tandem__V1__PrefillReply reply = TANDEM__V1__PREFILL_REPLY__INIT;
    Tandem__V1__TopLogprob *top = calloc(N, sizeof *top), **ptr = calloc(N, sizeof *ptr);
    uint8_t word[4] = {1, 2, 3, 4};
    for (size_t i = 0; i < N; i++) {
        tandem__v1__top_logprob__init(&top[i]);
        top[i].ids = top[i].logprobs = (ProtobufCBinaryData){.len = 4, .data = word};
        ptr[i] = &top[i];
    }
    p.logprobs.data = calloc(N, 4);
    p.logprobs.len = 4 * N;
    p.n_top = N;
    p.top = ptr;
    reply.prompt = &p;
    size_t n = tandem__v1__prefill_reply__get_packed_size(&reply);
    uint8_t *wire = malloc(n);
    tandem__v1__prefill_reply__pack(&reply, wire);
    ProtobufCMessage *m;
    assert_int_equal(unpack(&c, ROW(prefill_reply), wire, n, &m), 0);
    assert_int_equal(((Tandem__V1__PrefillReply *)m)->prompt->n_top, N);
    free(wire);
    free(p.logprobs.data);
    free(top);
    free(ptr);
    td_codec_done(&c);
}

/* ---- rules of every .proto ---- */

static void check_depth(const ProtobufCMessageDescriptor *d, int depth)
{
    assert_true(depth < 6); /* a recursive message never ends here */
    for (unsigned i = 0; i < d->n_fields; i++)
        if (d->fields[i].type == PROTOBUF_C_TYPE_MESSAGE)
            check_depth(d->fields[i].descriptor, depth + 1);
}

static void test_no_recursion(void **state)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(all); i++)
        check_depth(all[i], 0);
}

static int has_row(const char *name, size_t n)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(all); i++)
        if (strlen(all[i]->short_name) == n && memcmp(all[i]->short_name, name, n) == 0)
            return 1;
    return 0;
}

static void check_proto_text(const char *file, char *text)
{
    int client = strcmp(file, "inference.proto") == 0;
    char *save = NULL;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        if (strncmp(line, "message ", 8) == 0 && !has_row(line + 8, strcspn(line + 8, " {")))
            fail_msg("%s: %s has no row in test_wire.c", file, line);
        char *comment = strstr(line, "//");
        if (comment)
            *comment = 0;
        if (!client && strstr(line, " string "))
            fail_msg("%s: `string` outside inference.proto (NUL and UTF-8 are not checked by "
                     "protobuf-c): %s",
                     file, line);
        if (strstr(line, "syntax") && !strstr(line, "proto2"))
            fail_msg("%s: not proto2 (protoc-c refuses proto3 optional)", file);
    }
}

/* Rule: every message is in the table above; `string` only in the client's contract; proto2. */
static void test_sources(void **state)
{
    DIR *d = opendir(TD_SOURCE_DIR "/proto");
    unsigned n = 0;
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        size_t len = strlen(e->d_name);
        if (len < 6 || strcmp(e->d_name + len - 6, ".proto") != 0)
            continue;
        bytes b = read_file("proto", e->d_name);
        check_proto_text(e->d_name, b.p);
        free(b.p);
        n++;
    }
    closedir(d);
    assert_true(n >= 5);
}

/* ---- preamble ---- */

static void test_preamble(void **state)
{
    bytes b = read_file("tests/goldens/wire", "preamble.bin");
    td_preamble p;
    uint8_t out[TD_PREAMBLE_BYTES];
    assert_int_equal(td_preamble_unpack(b.p, b.n, &p), 0);
    assert_int_equal(p.type, TD_FRAME_DATA);
    assert_true(p.stream == 0x0102030405060708);
    assert_int_equal(p.sequence, 0x11121314);
    assert_int_equal(p.session, 0x21222324);
    td_preamble_pack(&p, out);
    assert_memory_equal(out, b.p, sizeof out);
    for (size_t n = 0; n < b.n; n++)
        assert_int_equal(td_preamble_unpack(b.p, n, &p), -EPROTO);
    for (size_t i = 0; i < 3; i++) { /* magic, magic, major */
        b.p[i] ^= 1;
        assert_int_equal(td_preamble_unpack(b.p, b.n, &p), -EPROTO);
        b.p[i] ^= 1;
    }
    b.p[3] = 9; /* a newer minor is fine */
    assert_int_equal(td_preamble_unpack(b.p, b.n, &p), 0);
    free(b.p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),     cmocka_unit_test(test_cut_everywhere),
        cmocka_unit_test(test_noise),       cmocka_unit_test(test_required_missing),
        cmocka_unit_test(test_lies),        cmocka_unit_test(test_amplification),
        cmocka_unit_test(test_budget_fits), cmocka_unit_test(test_no_recursion),
        cmocka_unit_test(test_sources),     cmocka_unit_test(test_preamble),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
