/* SPDX-License-Identifier: Apache-2.0 */
/* Guards steps that are begun before the one before is done: requests that come and go at different
 * steps get the ids that the synchronous engine gives them, also when the device runs nothing
 * before it is waited for; what fails is told to the right step; the host never waits. */
#include "tests/engine_util.h"

#include <errno.h>

#include "tests/kernels/emu_util.h"

enum { REQUESTS = 8, EMITTED_MAX = 12, VOCAB = 256, SEQS = 4 };

static const td_backend *under;

/* What one client wants. */
typedef struct request {
    uint32_t n_prompt, arrives, max_tokens, min_tokens;
    uint32_t cancel;  /* 0, or its stream is dropped after so many steps */
    uint32_t stop_at; /* 0, or its stop id is what it emits there if nobody stops it */
    td_sampling sampling;
} request;

static const td_logit_bias bias[] = {{7, 1.5f}, {9, -100.0f}};
#define BIASED .bias = bias, .n_bias = 2

/* Ends by max_tokens, by stop ids, by a dropped stream; joins beside running ones; rows that end a
 * block; all together need more blocks than there are, so that the last one gets freed ones. */
static const request requests[REQUESTS] = {
    {5, 0, 9, 0, 0, 0, {.frequency_penalty = 0.5f, .presence_penalty = 4.0f, .logprobs = 1}},
    {63, 0, 8, 0, 0, 0, {.repetition_penalty = 3.0f, .logprobs = 1, .n_top = 3}},
    {9, 1, 12, 0, 0, 3, {.temperature = 1.3f, .top_p = 0.95f, .seed = 2}},
    {3, 2, 11, 0, 6, 0, {.temperature = 1.0f, .top_k = 20, .seed = 3}},
    {17, 4, 12, 6, 0, 2, {.temperature = 2.0f, .seed = 4}},
    {4, 5, 1, 0, 0, 0, {.temperature = 1.0f, .seed = 5}},
    {6, 5, 10, 0, 0, 5, {.temperature = 1.0f, .min_p = 0.01f, .seed = 6, BIASED}},
    {20, 9, 5, 0, 0, 0, {.presence_penalty = 2.0f, BIASED, .logprobs = 1}},
};

typedef struct answer {
    uint32_t n, ids[EMITTED_MAX];
    float logprobs[EMITTED_MAX];
    uint32_t tops[EMITTED_MAX];
    td_finish finish;
} answer;

typedef struct client {
    td_seq *seq;
    int came;
} client;

typedef struct server {
    test_engine t;
    client c[REQUESTS];
    answer *answers;
    uint32_t n_steps; /* begun */
    /* the two steps under way */
    uint32_t who[2][SEQS], n[2], oldest;
    uint64_t n_ahead;
} server;

static test_engine open_model(const char *model)
{
    char dir[256];
    snprintf(dir, sizeof dir, "%s/%s", TD_SOURCE_DIR "/tests/goldens/models", model);
    return test_open((test_setup){.dir = dir,
                                  .backend = under,
                                  .type = TD_BF16,
                                  .threads = 1,
                                  .max_rows = 128,
                                  .max_seqs = SEQS,
                                  .n_blocks = 8});
}

/* Blocks for everything it can come to need, as a decode worker takes them. */
static void come(server *v, uint32_t i, const answer *unstopped)
{
    const request *r = &requests[i];
    uint32_t ids[64], stop = unstopped && r->stop_at ? unstopped[i].ids[r->stop_at] : 0;
    td_err err = {0};
    test_random_ids(40 + i, VOCAB, ids, r->n_prompt);
    td_seq_spec spec = {.ids = ids,
                        .n_ids = r->n_prompt,
                        .n_prompt = r->n_prompt,
                        .sampling = r->sampling,
                        .max_tokens = r->max_tokens,
                        .min_tokens = r->min_tokens,
                        .ignore_eos = 1,
                        .stop_ids = &stop,
                        .n_stop_ids = unstopped && r->stop_at};
    spec.sampling.top_p = r->sampling.top_p > 0 ? r->sampling.top_p : 1;
    if (!(r->sampling.repetition_penalty > 0))
        spec.sampling.repetition_penalty = 1;
    if (td_seq_new(v->t.engine, &spec, &v->c[i].seq, &err) < 0)
        fail_msg("%s", err.text);
    assert_int_equal(td_seq_reserve(v->c[i].seq, r->n_prompt + r->max_tokens - 1), 0);
    v->c[i].came = 1;
}

static void leave(server *v, uint32_t i)
{
    td_seq_free(v->c[i].seq);
    v->c[i].seq = NULL;
}

/* Prompts of those that came beside a token of all others; at most SEQS. */
static uint32_t plan(server *v, const answer *unstopped, uint32_t *who, td_step_item *items)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < REQUESTS; i++) {
        client *c = &v->c[i];
        if (!c->came && requests[i].arrives <= v->n_steps)
            come(v, i, unstopped);
        if (!c->seq || n == SEQS || td_seq_is_last(c->seq))
            continue;
        size_t n_ids;
        td_seq_ids(c->seq, &n_ids);
        uint32_t left =
            n_ids == requests[i].n_prompt && !td_seq_computed(c->seq) ? (uint32_t)n_ids : 1;
        for (uint32_t k = 0; td_engine_begun(v->t.engine) && k < v->n[v->oldest]; k++)
            if (v->who[v->oldest][k] == i)
                left = 1; /* its prompt is under way */
        who[n] = i;
        items[n++] = (td_step_item){.seq = c->seq, .n_tokens = left, .n_samples = 1};
    }
    return n;
}

static void take(server *v, const uint32_t *who, uint32_t n, const td_sample *samples)
{
    for (uint32_t k = 0; k < n; k++) {
        uint32_t i = who[k];
        answer *a = &v->answers[i];
        if (!v->c[i].seq)
            continue;
        assert_true(a->n < EMITTED_MAX);
        if (requests[i].sampling.logprobs) {
            a->logprobs[a->n] = samples[k].lp.logprob;
            a->tops[a->n] = samples[k].lp.n_top ? samples[k].lp.top_ids[0] : 0;
        }
        a->ids[a->n++] = samples[k].id;
        a->finish = td_seq_append(v->c[i].seq, samples[k].id);
        if (a->finish != TD_FINISH_NONE || a->n == requests[i].cancel)
            leave(v, i);
    }
}

/* One step after the other. */
static void serve_each(server *v, const answer *unstopped)
{
    td_step_item items[SEQS];
    td_sample samples[SEQS];
    uint32_t who[SEQS], n;
    while ((n = plan(v, unstopped, who, items)) > 0) {
        v->n_steps++;
        assert_int_equal(td_engine_step(v->t.engine, items, n, samples), 0);
        take(v, who, n, samples);
    }
}

static void end_oldest(server *v)
{
    td_sample samples[SEQS];
    assert_int_equal(td_engine_end(v->t.engine, samples), 0);
    take(v, v->who[v->oldest], v->n[v->oldest], samples);
    v->oldest ^= 1;
}

/* Each step is begun before the one before is ended. again: on a device that defers, none of them
 * may make it run. */
static void serve_ahead(server *v, const answer *unstopped, int again)
{
    td_step_item items[SEQS];
    for (;;) {
        uint32_t begun = td_engine_begun(v->t.engine), slot = v->oldest ^ begun;
        assert_true(begun < 2);
        uint32_t n = v->n[slot] = plan(v, unstopped, v->who[slot], items);
        uint64_t ran = td_emu_gpu_ran(emulated);
        if (n > 0) {
            v->n_steps++;
            assert_int_equal(td_engine_begin(v->t.engine, items, n), 0);
            v->n_ahead += begun;
            if (again) /* graphs are recorded, and scratches large enough */
                assert_int_equal(td_emu_gpu_ran(emulated), ran);
        }
        if (begun + (n > 0) == 0)
            return;
        if (begun == 1)
            end_oldest(v);
    }
}

static void run(const char *model, int ahead, int rounds, const answer *unstopped, answer *ret)
{
    server v = {.t = open_model(model), .answers = ret};
    for (int k = 0; k < rounds; k++) {
        for (int i = 0; i < REQUESTS; i++)
            v.c[i] = (client){0};
        memset(ret, 0, REQUESTS * sizeof *ret);
        v.n_steps = 0;
        if (ahead)
            serve_ahead(&v, unstopped, k > 0);
        else
            serve_each(&v, unstopped);
    }
    assert_true(v.n_ahead > 10 || !ahead);
    td_kv_stats stats;
    td_kv_pool_stats(td_engine_pool(v.t.engine), &stats);
    assert_int_equal(stats.n_used, 0);
    for (int i = 0; i < REQUESTS; i++)
        assert_null(v.c[i].seq);
    test_close(&v.t);
}

/* rounds: of the engine that begins ahead, on which the last one waits for nothing. */
static void same_answers(const char *model, int rounds)
{
    static answer unstopped[REQUESTS], want[REQUESTS], got[REQUESTS];
    run(model, 0, 1, NULL, unstopped);
    run(model, 0, 1, unstopped, want);
    run(model, 1, rounds, unstopped, got);
    for (int i = 0; i < REQUESTS; i++) { /* they end as the table says, and not all at once */
        const request *r = &requests[i];
        int stopped = want[i].finish == TD_FINISH_STOP;
        assert_true(!stopped || (r->stop_at && want[i].n < r->max_tokens));
        assert_true(stopped || !r->stop_at || r->min_tokens);
        assert_true(stopped || want[i].n == (r->cancel ? r->cancel : r->max_tokens));
    }
    assert_memory_equal(got, want, sizeof want);
}

static void ids_are_those_of_the_synchronous_engine(void **state)
{
    same_answers("qwen3", 1);
}

/* Rows of a handoff that are NaN. */
static td_seq *damaged(test_engine *t)
{
    uint32_t ids[10];
    uint64_t mark;
    size_t n;
    test_random_ids(3, VOCAB, ids, 10);
    td_seq *s = test_seq(t, ids, 10, 10, (td_sampling){0}, 4);
    td_kv_pool *pool = td_engine_pool(t->engine);
    assert_int_equal(td_seq_reserve(s, 13), 0);
    const td_block *b = td_seq_blocks(s, &n);
    assert_int_equal(td_kv_stage(pool, b, 1), 0);
    memset(td_kv_data(pool, b[0]), 0xff, t->info->kv.block_bytes);
    assert_int_equal(td_kv_import(pool, b, 1, &mark), 0);
    assert_int_equal(td_kv_wait(pool), 0);
    td_kv_unstage(pool, b, 1);
    td_seq_set_computed(s, 9);
    return s;
}

/* A step that fails takes the one behind it along, and nobody moves on; the engine goes on. */
static void a_failed_step_ends_what_is_begun(void **state)
{
    test_engine t = open_model("glm-groups");
    uint32_t ids[5], want[3];
    td_sample out[2];
    test_random_ids(9, VOCAB, ids, 5);
    for (int way = 0; way < 2; way++) {
        td_seq *s = test_seq(&t, ids, 5, 5, (td_sampling){.temperature = 1.0f, .seed = 8}, 4);
        assert_int_equal(td_seq_reserve(s, 8), 0);
        td_seq_append(s, test_prefill(&t, s, 5, NULL));
        td_seq *bad = way ? damaged(&t) : NULL;
        td_step_item items[2] = {{.seq = s, .n_tokens = 1, .n_samples = 1},
                                 {.seq = bad, .n_tokens = 1, .n_samples = 1}};
        if (way) {
            assert_int_equal(td_engine_begin(t.engine, items, 2), 0);
            assert_int_equal(td_engine_begin(t.engine, items, 2), 0);
            assert_int_equal(td_engine_end(t.engine, out), -EIO);
            assert_int_equal(td_engine_begun(t.engine), 0);
            assert_int_equal(td_seq_computed(s), 5);
            assert_int_equal(td_seq_computed(bad), 9);
        }
        for (int i = 0; i < 3; i++) {
            assert_int_equal(td_engine_step(t.engine, items, 1, out), 0);
            if (way)
                assert_int_equal(out[0].id, want[i]);
            want[i] = out[0].id;
            td_seq_append(s, out[0].id);
        }
        td_seq_free(bad);
        td_seq_free(s);
    }
    test_close(&t);
}

/* What needs the host is refused, and told apart from limits. */
static void what_needs_the_host_is_not_begun(void **state)
{
    test_engine t = open_model("qwen3");
    uint32_t ids[5];
    float logits[VOCAB];
    td_logprob lp[5];
    test_random_ids(9, VOCAB, ids, 5);
    td_seq *s = test_seq(&t, ids, 5, 5, (td_sampling){0}, 4);
    td_step_item it = {.seq = s, .n_tokens = 5, .n_samples = 1};
    assert_int_equal(td_engine_begin(t.engine, &it, 1), -EINVAL); /* no blocks */
    assert_int_equal(td_seq_reserve(s, 8), 0);
    it.n_tokens = 6;
    assert_int_equal(td_engine_begin(t.engine, &it, 1), -EINVAL); /* an id that nobody draws */
    it.n_tokens = 5;
    td_step_item refused[] = {it, it, it};
    refused[0].want_logits = 1;
    refused[0].ret_logits = logits;
    refused[1].n_samples = 2;
    refused[2].ret_prompt_lp = lp;
    for (int i = 0; i < 3; i++)
        assert_int_equal(td_engine_begin(t.engine, &refused[i], 1), -EAGAIN);
    td_sample out;
    assert_int_equal(td_engine_begin(t.engine, &it, 1), 0);
    it.n_tokens = 2;
    assert_int_equal(td_engine_begin(t.engine, &it, 1), -EINVAL); /* one is drawn */
    assert_int_equal(td_engine_end(t.engine, &out), 0);
    assert_int_equal(td_seq_computed(s), 5);
    td_seq_free(s);
    test_close(&t);
}

/* Memory is uploaded as it was when the copy was asked for, however much is on its way. */
static void uploads_have_read_what_they_copy(void **state)
{
    enum { COPIES = 7, BYTES = 900 << 10, LARGE = 5 << 20 };
    td_queue *q = NULL;
    td_err err = {0};
    td_backend_options o = {.act = TD_BF16, .n_threads = 1, .max_rows = 1, .max_context = 64};
    assert_int_equal(under->open(&o, &q, &err), 0);
    uint8_t *host = malloc(LARGE), *got = malloc(LARGE), *dev[COPIES + 1];
    for (int i = 0; i <= COPIES; i++) {
        size_t n = i < COPIES ? BYTES : LARGE;
        dev[i] = under->mem_alloc(q, n);
        for (size_t k = 0; k < n; k++)
            host[k] = (uint8_t)(k % 251 + (size_t)i);
        under->copy(q, dev[i], host, n);
        memset(host, 0xee, n);
    }
    for (int i = 0; i <= COPIES; i++) {
        size_t n = i < COPIES ? BYTES : LARGE;
        under->copy(q, got, dev[i], n);
        for (size_t k = 0; k < n; k++)
            if (got[k] != (uint8_t)(k % 251 + (size_t)i))
                fail_msg("copy %d differs at %zu", i, k);
        under->mem_free(q, dev[i]);
    }
    assert_int_equal(under->finish(q), 0);
    under->close(q);
    free(host);
    free(got);
}

/* Once more on a device that runs nothing before it is waited for. The last test of a device: it
 * stays so. */
static void nothing_is_waited_for_or_read_too_early(void **state)
{
    td_emu_gpu_defer(emulated);
    same_answers("glm-groups", 2);
    uploads_have_read_what_they_copy(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ids_are_those_of_the_synchronous_engine),
        cmocka_unit_test(a_failed_step_ends_what_is_begun),
        cmocka_unit_test(what_needs_the_host_is_not_begun),
        cmocka_unit_test(uploads_have_read_what_they_copy),
        cmocka_unit_test(nothing_is_waited_for_or_read_too_early),
    };
    setenv("TD_KV_POISON", "1", 1); /* freed rows are NaN, in the order of the device */
    int failed = 0;                 /* what is tested here does not depend on the order of lanes */
    for (uint32_t wave = 32; wave <= 64; wave += 32) {
        open_emulation(wave, 1, &under);
        failed +=
            cmocka_run_group_tests_name(wave == 32 ? "wave 32" : "wave 64", tests, NULL, NULL);
        close_emulation();
    }
    return failed;
}
