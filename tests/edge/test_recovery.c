/* SPDX-License-Identifier: Apache-2.0 */
/* Workers die, stop and come back under running streams; the router's dispatch and the workers are
 * the real ones, the workers real processes. Each stream must end whole, with the very tokens and
 * log-probabilities of an undisturbed run (promises 1 and 2), also when decode workers prefill
 * short prompts by themselves. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/identity.h"
#include "base/rand.h"
#include "net/loop.h"
#include "net/metrics.h"
#include "router/dispatch.h"
#include "base/banned.h"

#define MODEL TD_SOURCE_DIR "/tests/goldens/models/glm-mixed"

enum { N = 8, CHOICES = 2, TOKENS = 120, VOCAB = 256, WAIT_S = 60, P1 = 0, P2, D1, D2, WORKERS };

typedef struct stream {
    td_gen *gen;
    uint32_t ids[CHOICES][TOKENS], n[CHOICES];
    float logprobs[CHOICES][TOKENS];
    int ends;
    td_error error;
    uint32_t attempts, local_tokens;
    char text[200];
} stream;

static td_loop *loop;
static td_metrics *metrics;
static td_dispatch *dispatch;
static char dir[64];
static pid_t pids[WORKERS];
static stream want[N], got[N];
static uint32_t local_tokens; /* 0: every prompt goes to a prefill worker */
static uint64_t n_delivered;
/* An accident: when so many tokens went out, the signal goes to the worker. */
static uint64_t accident_at;
static int accident_worker, accident_signal;

/* ---- processes ---- */

static void start(int w)
{
    char control[128], kv[128], name[16], path[512];
    const char *program = w >= D1 ? "tandem-decode-worker" : "tandem-prefill-worker";
    snprintf(control, sizeof control, "ipc://%s/control.sock", dir);
    snprintf(kv, sizeof kv, "ipc://%s/kv%d.sock", dir, w);
    snprintf(name, sizeof name, "w%d", w);
    snprintf(path, sizeof path, "%s/%s", TD_BINARY_DIR, program);
    char *argv[] = {(char *)(uintptr_t)program,
                    "--model",
                    MODEL,
                    "--control",
                    control,
                    "--name",
                    name,
                    "--threads",
                    "1",
                    "--kv-blocks",
                    "128",
                    "--log-level",
                    "error",
                    NULL,
                    NULL,
                    NULL};
    if (w >= D1) {
        argv[13] = "--kv-listen";
        argv[14] = kv;
    }
    pids[w] = fork();
    assert_true(pids[w] >= 0);
    if (pids[w])
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* never outlive a test that fails */
    execv(path, argv);
    fprintf(stderr, "%s: %m\n", path);
    _exit(127);
}

static void reap(int w)
{
    int status;
    if (!pids[w])
        return;
    kill(pids[w], SIGKILL);
    waitpid(pids[w], &status, 0);
    pids[w] = 0;
}

/* Never kill(0, ...): a process that is gone would mean this whole process group. */
static void hit(int w, int signal)
{
    assert_true(pids[w] > 0);
    assert_int_equal(kill(pids[w], signal), 0);
}

static void wait_for(uint32_t n_prefill, uint32_t n_decode)
{
    td_dispatch_state s;
    uint64_t end = td_now_us() + WAIT_S * TD_S;
    do {
        td_loop_run_once(loop, 20000);
        td_dispatch_get_state(dispatch, &s);
        if (td_now_us() > end)
            fail_msg("%u prefill and %u decode workers, %u and %u expected", s.n_prefill,
                     s.n_decode, n_prefill, n_decode);
    } while (s.n_prefill != n_prefill || s.n_decode != n_decode);
}

/* ---- streams ---- */

static void on_run(void *arg, const td_gen_run *r)
{
    stream *s = arg;
    assert_int_equal(s->ends, 0);
    assert_int_equal(r->index, s->n[r->choice]);
    assert_non_null(r->logprobs);
    for (size_t i = 0; i < r->n; i++) {
        s->logprobs[r->choice][s->n[r->choice]] = r->logprobs[i];
        s->ids[r->choice][s->n[r->choice]++] = r->ids[i];
    }
    n_delivered += r->n;
    if (accident_at && n_delivered >= accident_at) {
        accident_at = 0;
        hit(accident_worker, accident_signal);
    }
}

static void on_end(void *arg, td_error error, const char *text, uint32_t retry_after_ms,
                   const td_gen_usage *usage)
{
    stream *s = arg;
    s->ends++;
    s->error = error;
    s->attempts = usage->attempts;
    s->local_tokens = usage->local_tokens;
    snprintf(s->text, sizeof s->text, "%s", text ? text : "");
}

static void submit(stream *s, uint32_t i)
{
    static const td_gen_ops ops = {.on_run = on_run, .on_end = on_end};
    static const uint32_t lengths[N] = {1, 63, 64, 65, 130, 7, 200, 33};
    static uint32_t serial;
    uint32_t prompt[256], retry;
    char id[32];
    td_err err = {0};
    td_error e;
    td_rng rng = {.seed = 100 + i};
    for (uint32_t k = 0; k < lengths[i]; k++)
        prompt[k] = 2 + (uint32_t)td_rng_below(&rng, VOCAB - 2);
    snprintf(id, sizeof id, "r%u", ++serial);
    td_gen_spec spec = {.request_id = td_str_of(id),
                        .tenant = td_str_of("t"),
                        .prompt = prompt,
                        .n_prompt = lengths[i],
                        .n = i % 3 == 0 ? 2 : 1,
                        .max_tokens = TOKENS,
                        .ignore_eos = 1,
                        .temperature = 0.8f,
                        .top_p = 0.95f,
                        .top_k = 50,
                        .repetition_penalty = 1.1f,
                        .seed = 7 + i,
                        .logprobs = 1,
                        .timeout_us = WAIT_S * TD_S};
    memset(s, 0, sizeof *s);
    if (td_dispatch_submit(dispatch, &spec, &ops, s, &s->gen, &e, &retry, &err) < 0)
        fail_msg("refused: %s", err.text);
}

static uint32_t run_all(stream *s)
{
    uint64_t end = td_now_us() + 2 * WAIT_S * TD_S;
    uint32_t moved = 0;
    n_delivered = 0;
    for (uint32_t i = 0; i < N; i++)
        submit(&s[i], i);
    for (uint32_t i = 0; i < N; i++) {
        while (!s[i].ends) {
            td_loop_run_once(loop, 20000);
            if (td_now_us() > end)
                fail_msg("stream %u does not end after %u tokens", i, s[i].n[0]);
        }
        if (s[i].error)
            fail_msg("stream %u ended with %s after %u tokens: %s", i,
                     td_error_get(s[i].error)->name, s[i].n[0], s[i].text);
        moved += s[i].attempts > 1;
    }
    return moved;
}

static void must_be_equal(void)
{
    for (uint32_t i = 0; i < N; i++)
        for (uint32_t c = 0; c < (i % 3 == 0 ? 2u : 1u); c++) {
            assert_int_equal(got[i].n[c], TOKENS);
            for (uint32_t k = 0; k < TOKENS; k++)
                if (got[i].ids[c][k] != want[i].ids[c][k] ||
                    memcmp(&got[i].logprobs[c][k], &want[i].logprobs[c][k], sizeof(float)) != 0)
                    fail_msg("stream %u choice %u differs at token %u, attempt %u", i, c, k,
                             got[i].attempts);
        }
}

static uint32_t disturbed(uint64_t after_tokens, int worker, int signal)
{
    accident_at = after_tokens;
    accident_worker = worker;
    accident_signal = signal;
    uint32_t moved = run_all(got);
    assert_int_equal(accident_at, 0); /* it did happen */
    must_be_equal();
    return moved;
}

/* ---- tests ---- */

/* D1 is killed in the middle of its streams, again and again */
static void decode_is_killed(void **state)
{
    for (uint64_t after = 40; after < 1000; after += 300) {
        uint32_t moved = disturbed(after, D1, SIGKILL);
        /* early on some streams are there and move; late ones may all have ended */
        assert_true(moved > 0 || after > 40);
        reap(D1);
        wait_for(2, 1);
        start(D1);
        wait_for(2, 2);
    }
}

/* P1 is killed while some prompts are computed or on their way */
static void prefill_is_killed(void **state)
{
    disturbed(1, P1, SIGKILL);
    reap(P1);
    wait_for(1, 2);
    start(P1);
    wait_for(2, 2);
}

/* P1 stops with prompts in hand: silence moves them too */
static void prefill_is_frozen(void **state)
{
    disturbed(1, P1, SIGSTOP);
    hit(P1, SIGCONT);
    wait_for(2, 2);
    run_all(got);
    must_be_equal();
}

/* D1 stops for longer than the router waits, and wakes up when its streams are elsewhere: what it
 * then says is of the past */
static void decode_is_frozen(void **state)
{
    assert_true(disturbed(200, D1, SIGSTOP) > 0);
    hit(D1, SIGCONT);
    wait_for(2, 2);
    run_all(got);
    must_be_equal();
}

/* A worker that is told to end finishes what it has: nothing moves, nobody notices */
static void decode_leaves(void **state)
{
    int status = -1;
    assert_int_equal(disturbed(200, D2, SIGTERM), 0);
    for (uint64_t end = td_now_us() + WAIT_S * TD_S; waitpid(pids[D2], &status, WNOHANG) == 0;) {
        if (td_now_us() > end)
            fail_msg("the worker does not end");
        td_loop_run_once(loop, 20000);
    }
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    pids[D2] = 0;
    wait_for(2, 1);
    start(D2);
    wait_for(2, 2);
}

static int open_all(void **state)
{
    char control[128];
    td_err err = {0};
    td_dispatch_config c = {
        .max_queue = 64, .vocab_size = VOCAB, .max_context = 2048, .local_tokens = local_tokens};
    snprintf(dir, sizeof dir, "/tmp/tandem-test-XXXXXX");
    assert_non_null(mkdtemp(dir));
    snprintf(control, sizeof control, "ipc://%s/control.sock", dir);
    c.control = control;
    assert_int_equal(td_loop_new(&loop), 0);
    assert_int_equal(td_metrics_new(&metrics), 0);
    c.metrics = metrics;
    if (td_identity_read(MODEL, c.config_hash, c.tokenizer_hash, &err) < 0 ||
        td_dispatch_open(loop, &c, &dispatch, &err) < 0)
        fail_msg("%s", err.text);
    for (int w = 0; w < WORKERS; w++)
        start(w);
    wait_for(2, 2);
    assert_int_equal(run_all(want), 0);
    return 0;
}

/* The same again with the other policy: the same tokens, and short prompts that no prefill worker
 * saw. */
static int open_local(void **state)
{
    static const uint32_t expect[N] = {1, 63, 64, 65, 0, 7, 0, 33};
    static stream split[N];
    memcpy(split, want, sizeof split);
    local_tokens = 100;
    if (open_all(state) < 0)
        return -1;
    memcpy(got, split, sizeof got);
    must_be_equal();
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(want[i].local_tokens, expect[i]);
    return 0;
}

static int close_all(void **state)
{
    char command[128];
    for (int w = 0; w < WORKERS; w++)
        reap(w);
    td_dispatch_close(dispatch);
    td_metrics_free(metrics);
    td_loop_free(loop);
    snprintf(command, sizeof command, "rm -rf %s", dir);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(decode_is_killed),  cmocka_unit_test(prefill_is_killed),
        cmocka_unit_test(prefill_is_frozen), cmocka_unit_test(decode_is_frozen),
        cmocka_unit_test(decode_leaves),
    };
    const struct CMUnitTest local[] = {
        cmocka_unit_test(decode_is_killed),
        cmocka_unit_test(decode_is_frozen),
        cmocka_unit_test(decode_leaves),
    };
    int failed = cmocka_run_group_tests(tests, open_all, close_all);
    return failed + cmocka_run_group_tests(local, open_local, close_all);
}
