/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: what a client reads does not depend on how tokens arrive in runs (promise 1 at the edge),
 * and never splits a character or shows half a stop string. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "base/rand.h"
#include "router/choice.h"

static td_card *card;

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

typedef struct result {
    char content[2000], reasoning[2000];
    const char *finish;
    uint64_t n_tokens;
    int stopped;
} result;

static void take(result *r, td_choice *c)
{
    assert_true(td_utf8_valid(c->content_text.data, c->content_text.len));
    assert_true(td_utf8_valid(c->reasoning_text.data, c->reasoning_text.len));
    size_t n = strlen(r->content), m = strlen(r->reasoning);
    snprintf(r->content + n, sizeof r->content - n, "%s", c->content_text.data);
    snprintf(r->reasoning + m, sizeof r->reasoning - m, "%s", c->reasoning_text.data);
    td_choice_clear(c);
}

/* Feed ids in runs of random lengths (seed 0: all at once), emptying the output now and then. */
static void feed(const td_params *p, const td_ids *ids, int finish, uint64_t seed, result *ret)
{
    td_choice c;
    td_rng rng = {.seed = seed};
    memset(ret, 0, sizeof *ret);
    assert_int_equal(td_choice_init(&c, card, p, TD_API_CHAT, 0), 0);
    for (size_t at = 0; at < ids->n && !c.finished;) {
        size_t n = seed ? 1 + td_rng_below(&rng, 5) : ids->n;
        n = n < ids->n - at ? n : ids->n - at;
        td_gen_run run = {.index = (uint32_t)at,
                          .ids = ids->data + at,
                          .n = n,
                          .finish = at + n == ids->n ? finish : 0};
        int r = td_choice_add(&c, &run);
        assert_true(r >= 0);
        ret->stopped |= r;
        at += n;
        if (!seed || td_rng_below(&rng, 2))
            take(ret, &c);
    }
    take(ret, &c);
    ret->finish = c.finish;
    ret->n_tokens = c.n_tokens;
    td_choice_done(&c);
}

static void encode(const char *text, td_ids *ids)
{
    memset(ids, 0, sizeof *ids);
    assert_int_equal(td_tokenizer_encode(card->tok, text, strlen(text), 0, ids), 0);
}

static td_params thinking(void)
{
    td_params p;
    td_params_init(card, &p);
    p.starts_in_reasoning = 1;
    return p;
}

static void every_split(const td_params *p, const td_ids *ids, int finish, result *ret)
{
    result other;
    feed(p, ids, finish, 0, ret);
    for (uint64_t seed = 1; seed <= 200; seed++) {
        feed(p, ids, finish, seed, &other);
        assert_string_equal(other.content, ret->content);
        assert_string_equal(other.reasoning, ret->reasoning);
        assert_int_equal(other.n_tokens, ret->n_tokens);
        assert_ptr_equal(other.finish, ret->finish);
    }
}

enum { STOP_ID = 1, LENGTH = 2 };

/* text in any runs is read as reasoning and content, and all its tokens are counted unless a stop
 * string ends it. */
static result reads(const td_params *p, const char *text, int finish, const char *reasoning,
                    const char *content)
{
    td_ids ids;
    result r;
    encode(text, &ids);
    every_split(p, &ids, finish, &r);
    assert_string_equal(r.reasoning, reasoning);
    assert_string_equal(r.content, content);
    if (!r.stopped)
        assert_int_equal(r.n_tokens, ids.n);
    assert_string_equal(r.finish, finish == LENGTH && !r.stopped ? "length" : "stop");
    td_ids_done(&ids);
    return r;
}

static void test_reasoning(void **state)
{
    td_params p = thinking();
    reads(&p, "2+2: 4, größer 🙂 <thin </thin\n</think>\n\nThe answer is 世界 4. <b>", LENGTH,
          "2+2: 4, größer 🙂 <thin </thin", "The answer is 世界 4. <b>");
}

/* Cut off inside the thought: everything is reasoning. */
static void test_only_reasoning(void **state)
{
    td_params p = thinking();
    reads(&p, "still thinking </thi", LENGTH, "still thinking </thi", "");
}

static void test_stop_strings(void **state)
{
    td_params p = thinking();
    p.starts_in_reasoning = 0;
    p.stops[p.n_stops++] = td_str_of("END of");
    p.stops[p.n_stops++] = td_str_of("ND o");
    /* the earliest completed one */
    assert_true(reads(&p, "one END two END of three", LENGTH, "", "one END two E").stopped);
    p.n_stops = 1;
    assert_true(reads(&p, "one END two END of three", LENGTH, "", "one END two ").stopped);
    /* a held beginning is text in the end */
    assert_false(reads(&p, "nothing E", LENGTH, "", "nothing E").stopped);
}

/* The stop id counts as a token and is not text; other special tokens are not text either. */
static void test_stop_id(void **state)
{
    td_params p = thinking();
    reads(&p, "done</think>ok<|observation|>fine<|user|>", STOP_ID, "done", "okfine");
}

/* A character in pieces at the very end becomes U+FFFD once. */
static void test_cut_character(void **state)
{
    td_params p = thinking();
    td_ids ids;
    result r;
    p.starts_in_reasoning = 0;
    encode("x 🙂", &ids);
    ids.n--;
    every_split(&p, &ids, LENGTH, &r);
    assert_non_null(strstr(r.content, "\xEF\xBF\xBD"));
    td_ids_done(&ids);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reasoning), cmocka_unit_test(test_only_reasoning),
        cmocka_unit_test(test_stop_strings), cmocka_unit_test(test_stop_id),
        cmocka_unit_test(test_cut_character)};
    return cmocka_run_group_tests(tests, open_card, close_card);
}
