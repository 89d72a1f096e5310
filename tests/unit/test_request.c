/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: a request body never crashes the router and a bad field is named (reliability: numbers
 * unchecked at ingress). The boundary cases come from the request table itself. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/bug.h"
#include "base/rand.h"
#include "base/strbuf.h"
#include "router/request.h"

static td_card *card;
static const uint8_t secret[32] = "0123456789abcdef0123456789abcdef";

static td_request_context context(void)
{
    return (td_request_context){.card = card,
                                .max_context = card->max_context,
                                .prefix_secret = secret,
                                .prefix_secret_bytes = sizeof secret,
                                .tenant = {"t", 1}};
}

typedef struct parsed {
    td_arena arena;
    td_params p;
    td_request_error e;
    int r;
} parsed;

static void parse_ctx(parsed *o, const td_request_context *ctx, td_api api, const char *body,
                      size_t n)
{
    memset(o, 0, sizeof *o);
    td_arena_init(&o->arena, 16 << 20);
    o->r = td_request_parse(ctx, api, (td_str){body, n}, &o->arena, &o->p, &o->e);
}

static void parse(parsed *o, td_api api, const char *body)
{
    td_request_context ctx = context();
    parse_ctx(o, &ctx, api, body, strlen(body));
}

static int open_card(void **state)
{
    td_err err = {0};
    int r = td_card_open(TD_SOURCE_DIR "/models/glm-tiny", NULL, &card, &err);
    if (r < 0)
        fprintf(stderr, "%s\n", err.text);
    return r;
}

static int close_card(void **state)
{
    td_card_free(card);
    return 0;
}

/* Every numeric row: its bounds are taken, what lies beyond is refused with param = its name. */
static void test_bounds(void **state)
{
    enum { NUM, INT, BOOL, STR, OWN, ACCEPT, REFUSE };
    enum { C = TD_API_CHAT, P = TD_API_COMPLETIONS, T = TD_API_TOKENIZE, D = TD_API_DETOKENIZE };
    static const struct {
        const char *name;
        int apis, type;
        double lo, hi;
    } rows[] = {
#define TD_FIELD(name, apis, type, lo, hi, member, note) {name, apis, type, lo, hi},
#include "router/request.def"
#undef TD_FIELD
    };
    char body[300];
    parsed o;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (rows[i].type != NUM && rows[i].type != INT)
            continue;
        td_api api = rows[i].apis & C ? TD_API_CHAT : TD_API_COMPLETIONS;
        const char *base = api == TD_API_CHAT
                               ? "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"
                               : "\"prompt\":\"hi\"";
        double bad[] = {rows[i].lo - 1, rows[i].hi + 1, 1e300, -1e300};
        for (size_t k = 0; k < 4; k++) {
            snprintf(body, sizeof body, "{%s,\"%s\":%.17g}", base, rows[i].name, bad[k]);
            parse(&o, api, body);
            assert_int_equal(o.r, -EINVAL);
            assert_string_equal(o.e.param, rows[i].name);
            td_arena_done(&o.arena);
        }
        const char *wrong[] = {"\"x\"", "[]", "{}", "true"};
        for (size_t k = 0; k < 4; k++) {
            snprintf(body, sizeof body, "{%s,\"%s\":%s}", base, rows[i].name, wrong[k]);
            parse(&o, api, body);
            assert_int_equal(o.r, -EINVAL);
            assert_string_equal(o.e.param, rows[i].name);
            td_arena_done(&o.arena);
        }
    }
}

/* A field that is refused is refused by name, and empty forms of it pass. */
static void test_refused(void **state)
{
    parsed o;
    parse(&o, TD_API_CHAT,
          "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"tools\":[{\"type\":\"function\"}"
          "]}");
    assert_int_equal(o.e.error, TD_ERROR_UNSUPPORTED);
    assert_string_equal(o.e.param, "tools");
    td_arena_done(&o.arena);
    parse(&o, TD_API_CHAT,
          "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"tools\":[],\"functions\":null,"
          "\"tool_choice\":\"auto\"}");
    assert_int_equal(o.r, 0);
    td_arena_done(&o.arena);
}

/* GLM's template drops role developer silently; clients send it. */
static void test_developer_is_system(void **state)
{
    parsed a, b;
    parse(&a, TD_API_CHAT,
          "{\"messages\":[{\"role\":\"developer\",\"content\":\"Be "
          "brief.\"},{\"role\":\"user\",\"content\":\"hi\"}]}");
    parse(&b, TD_API_CHAT,
          "{\"messages\":[{\"role\":\"system\",\"content\":\"Be "
          "brief.\"},{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"h\"},{\"type\":"
          "\"text\",\"text\":\"i\"}]}]}");
    assert_int_equal(a.r, 0);
    assert_int_equal(b.r, 0);
    assert_int_equal(a.p.prompts[0].n_ids, b.p.prompts[0].n_ids);
    assert_memory_equal(a.p.prompts[0].ids, b.p.prompts[0].ids, a.p.prompts[0].n_ids * 4);
    td_arena_done(&a.arena);
    td_arena_done(&b.arena);
}

/* The prefix key separates tenants and salts: a shared cache would tell one tenant of another's
 * prompts. */
static void test_prefix_keys(void **state)
{
    static const char body[] = "{\"prompt\":\"hi\"}",
                      salted[] = "{\"prompt\":\"hi\",\"cache_salt\":\"s\"}";
    td_request_context ctx = context(), other = context();
    other.tenant = (td_str){"u", 1};
    parsed a, b, c, d;
    parse_ctx(&a, &ctx, TD_API_COMPLETIONS, body, strlen(body));
    parse_ctx(&b, &ctx, TD_API_COMPLETIONS, body, strlen(body));
    parse_ctx(&c, &other, TD_API_COMPLETIONS, body, strlen(body));
    parse_ctx(&d, &ctx, TD_API_COMPLETIONS, salted, strlen(salted));
    assert_memory_equal(a.p.prefix_key, b.p.prefix_key, 32);
    assert_memory_not_equal(a.p.prefix_key, c.p.prefix_key, 32);
    assert_memory_not_equal(a.p.prefix_key, d.p.prefix_key, 32);
    parsed *all[] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; i++)
        td_arena_done(&all[i]->arena);
}

/* 20,000 mutations of a valid body: an answer or a typed error, nothing else. */
static void test_mutations(void **state)
{
    static const char base[] =
        "{\"model\":\"glm-tiny\",\"messages\":[{\"role\":\"system\",\"content\":\"a\"},{\"role\":"
        "\"user\",\"content\":[{\"type\":"
        "\"text\",\"text\":\"b\"}]}],\"temperature\":0.5,\"top_k\":3,\"stop\":[\"x\",\"yy\"],"
        "\"logit_bias\":{\"5\":1.5},\"n\":2,"
        "\"seed\":-4,\"stream\":true,\"stream_options\":{\"include_usage\":true},\"max_tokens\":7}";
    td_rng rng = {.seed = 42};
    td_request_context ctx = context();
    parsed o;
    int good = 0;
    parse(&o, TD_API_CHAT, base);
    assert_int_equal(o.r, 0);
    td_arena_done(&o.arena);
    for (int i = 0; i < 20000; i++) {
        char body[sizeof base];
        size_t n = sizeof base - 1;
        memcpy(body, base, sizeof base);
        for (uint64_t k = 1 + td_rng_below(&rng, 3); k; k--) {
            size_t at = td_rng_below(&rng, n);
            switch (td_rng_below(&rng, 4)) {
            case 0:
                body[at] = (char)td_rng_next(&rng);
                break;
            case 1:
                body[at] = "{}[]\",:0129-e."[td_rng_below(&rng, 14)];
                break;
            case 2:
                memmove(body + at, body + at + 1, n - at);
                n -= n > 1;
                break;
            default:
                n = TD_MAX(at, (size_t)1);
            }
        }
        parse_ctx(&o, &ctx, TD_API_CHAT, body, n);
        assert_true(o.r == 0 || (o.r == -EINVAL && o.e.error != TD_ERROR_NONE && *o.e.text));
        good += o.r == 0;
        td_arena_done(&o.arena);
    }
    assert_true(good > 0);
}

static void test_context_length(void **state)
{
    parsed o;
    char body[200];
    snprintf(body, sizeof body, "{\"prompt\":[1,2,3],\"max_tokens\":%u}", card->max_context - 3);
    parse(&o, TD_API_COMPLETIONS, body);
    assert_int_equal(o.r, 0);
    assert_int_equal(o.p.limit, card->max_context - 3);
    td_arena_done(&o.arena);
    snprintf(body, sizeof body, "{\"prompt\":[1,2,3],\"max_tokens\":%u}", card->max_context - 2);
    parse(&o, TD_API_COMPLETIONS, body);
    assert_int_equal(o.e.error, TD_ERROR_CONTEXT_LENGTH);
    assert_non_null(strstr(o.e.text, "maximum context length is"));
    td_arena_done(&o.arena);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_bounds),
                                       cmocka_unit_test(test_refused),
                                       cmocka_unit_test(test_developer_is_system),
                                       cmocka_unit_test(test_prefix_keys),
                                       cmocka_unit_test(test_mutations),
                                       cmocka_unit_test(test_context_length)};
    return cmocka_run_group_tests(tests, open_card, close_card);
}
