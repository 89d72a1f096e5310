/* SPDX-License-Identifier: Apache-2.0 */
/* A request that the engine cannot compute fails with a typed error and nobody else does (promise
 * 2): not those in the same step, not those after it, however often it comes. The checkpoint has an
 * embedding row of NaN, so a prompt with that id makes a kernel fail. A worker that can compute
 * nothing leaves, for its supervisor to start a new one. Real processes. */
#include "tests/edge/cluster.h"

#include <fcntl.h>
#include <sys/stat.h>

#define SOURCE TD_SOURCE_DIR "/tests/goldens/models/glm-shared"
#define CHUNK  "64"

enum { HIDDEN = 64, N = 6, VOCAB = 256, TOKENS = 20 };

static cluster cl;
static request rq[N], alone[N];
static uint32_t serial, poison,
    victim; /* stream `victim` emits the id `poison`, no other meets it */
static char dir[64], broken_dir[64];

/* ---- checkpoints ---- */

static void copy_file(const char *from_dir, const char *to_dir, const char *name)
{
    char path[256];
    static char data[1 << 20];
    snprintf(path, sizeof path, "%s/%s", from_dir, name);
    int in = open(path, O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "%s/%s", to_dir, name);
    int out = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(in >= 0 && out >= 0);
    for (ssize_t n; (n = read(in, data, sizeof data)) > 0;)
        assert_int_equal(write(out, data, (size_t)n), n);
    close(in);
    close(out);
}

/* Where the embedding begins in the file. */
static off_t embedding(int fd)
{
    static char head[1 << 16];
    uint64_t n;
    unsigned long long from;
    assert_int_equal(pread(fd, &n, 8, 0), 8);
    assert_true(n < sizeof head);
    assert_int_equal(pread(fd, head, n, 8), (ssize_t)n);
    head[n] = 0;
    const char *at = strstr(head, "\"model.embed_tokens.weight\"");
    assert_non_null(at);
    at = strstr(at, "data_offsets\":[");
    assert_non_null(at);
    assert_int_equal(sscanf(at + strlen("data_offsets\":["), "%llu", &from), 1);
    return (off_t)(8 + n + from);
}

static void make_checkpoint(char *ret_dir, size_t n, uint32_t first, uint32_t last)
{
    static const char *const names[] = {"config.json", "generation_config.json",
                                        "model.safetensors"};
    char path[128];
    uint16_t row[HIDDEN];
    snprintf(ret_dir, n, "/tmp/tandem-test-XXXXXX");
    assert_non_null(mkdtemp(ret_dir));
    for (size_t i = 0; i < TD_ARRAY_LEN(names); i++)
        copy_file(SOURCE, ret_dir, names[i]);
    snprintf(path, sizeof path, "%s/model.safetensors", ret_dir);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_true(fd >= 0);
    off_t at = embedding(fd);
    for (int i = 0; i < HIDDEN; i++)
        row[i] = 0x7FC0; /* NaN in BF16 */
    for (uint32_t id = first; id <= last; id++)
        assert_int_equal(pwrite(fd, row, sizeof row, at + (off_t)(id * sizeof row)),
                         (ssize_t)sizeof row);
    close(fd);
}

static void remove_checkpoint(const char *d)
{
    static const char *const names[] = {"config.json", "generation_config.json",
                                        "model.safetensors"};
    char path[128];
    for (size_t i = 0; i < TD_ARRAY_LEN(names); i++) {
        snprintf(path, sizeof path, "%s/%s", d, names[i]);
        unlink(path);
    }
    rmdir(d);
}

/* ---- requests ---- */

static request *make(request *r, uint32_t i, int poisoned)
{
    td_rng rng = {.seed = 300 + i};
    memset(r, 0, sizeof *r);
    r->n_prompt = 5 + 9 * i; /* several fit one step */
    for (size_t k = 0; k < r->n_prompt; k++) {
        r->prompt[k] = (uint32_t)td_rng_below(&rng, 250);
    }
    if (poisoned)
        r->prompt[r->n_prompt / 2] = poison;
    r->max_tokens = TOKENS;
    r->temperature = 0.8f;
    r->repetition_penalty = 1;
    r->seed = i;
    memset(r->prefix_key, (int)(serial % 250), 32);
    snprintf(r->id, sizeof r->id, "x%u", serial++);
    return r;
}

static void must_fail(const request *r)
{
    assert_int_equal(r->code[0], TD_INTERNAL);
    assert_non_null(strstr(r->why[0], "engine failed"));
    assert_int_equal(r->n_tokens[0], 0);
}

static void must_be_whole(uint32_t i)
{
    request_must_succeed(&rq[i]);
    assert_int_equal(rq[i].n_tokens[0], TOKENS);
    assert_memory_equal(rq[i].tokens[0], alone[i].tokens[0], TOKENS * sizeof(token));
}

/* Same steps, same queue: the others get the tokens they get alone from the sound checkpoint. */
static void prefill_fails_one(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < N; i++)
        request_start(&cl, make(&rq[i], i, i % 2 || i == victim));
    for (uint32_t i = 0; i < N; i++) {
        request_wait(&cl, &rq[i]);
        if (i % 2 || i == victim)
            must_fail(&rq[i]);
        else
            must_be_whole(i);
    }
}

/* The victim dies of its own token, on the decode worker, in a step with all the others. */
static void decode_fails_one(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < N; i++)
        request_start(&cl, make(&rq[i], i, 0));
    for (uint32_t i = 0; i < N; i++) {
        request_wait(&cl, &rq[i]);
        if (i != victim) {
            must_be_whole(i);
            continue;
        }
        const request *r = &rq[i];
        assert_int_equal(r->code[1], TD_INTERNAL);
        assert_non_null(strstr(r->why[1], "engine failed"));
        assert_int_equal(r->tokens[0][r->n_tokens[0] - 1].id, poison);
        /* index 0 is P's, whose call ends here as soon as D's does */
        for (uint32_t k = !r->first_seen[0]; k < r->n_tokens[0]; k++)
            assert_memory_equal(&r->tokens[0][k], &alone[i].tokens[0][k], sizeof(token));
    }
}

/* The same where decode workers prefill by themselves: one step holds all. */
static void local_prefill_fails_one(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < N; i++) {
        make(&rq[i], i, i % 2 || i == victim);
        rq[i].local_tokens = 100;
        request_start(&cl, &rq[i]);
    }
    for (uint32_t i = 0; i < N; i++) {
        request_wait(&cl, &rq[i]);
        assert_true(rq[i].local > 0);
        if (i % 2 || i == victim) {
            assert_int_equal(rq[i].code[1], TD_INTERNAL);
            assert_non_null(strstr(rq[i].why[1], "engine failed"));
            assert_int_equal(rq[i].n_tokens[0], 0);
        } else {
            must_be_whole(i);
        }
    }
}

/* Alone in every step, many times in a row: the worker is still there. */
static void again_and_again(void **state)
{
    (void)state;
    uint32_t sound = victim == 0;
    for (uint32_t i = 0; i < 8; i++) {
        request_start(&cl, make(&rq[0], 1, 1));
        request_wait(&cl, &rq[0]);
        must_fail(&rq[0]);
        request_start(&cl, make(&rq[victim], victim, 0));
        request_wait(&cl, &rq[victim]);
        assert_int_equal(rq[victim].code[1], TD_INTERNAL);
    }
    assert_int_equal(waitpid(cl.pid[0], NULL, WNOHANG), 0);
    assert_int_equal(waitpid(cl.pid[1], NULL, WNOHANG), 0);
    request_start(&cl, make(&rq[sound], sound, 0));
    request_wait(&cl, &rq[sound]);
    must_be_whole(sound);
}

/* An engine that never computed anything: after a few steps the worker says so and leaves. */
static void broken_engine_leaves(void **state)
{
    (void)state;
    int status = 0;
    stop_worker(&cl, 0);
    start_prefill(&cl, broken_dir, CHUNK, "60");
    for (uint32_t i = 0; i < 3; i++) {
        make(&rq[i], i, 0);
        rq[i].max_tokens = 1;
        rq[i].c = &cl;
        rq[i].attempt = rq[i].n = 1;
        start_prefill_call(&rq[i], NULL);
        request_wait(&cl, &rq[i]);
        must_fail(&rq[i]);
    }
    for (uint64_t end = td_now_us() + 30 * TD_S;
         waitpid(cl.pid[0], &status, WNOHANG) != cl.pid[0];) {
        assert_true(td_now_us() < end);
        cluster_turn(&cl);
    }
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    wait_session(&cl, 0, 0);
    start_prefill(&cl, dir, CHUNK, "60");
}

static uint32_t times_met(const request *r, uint32_t id)
{
    uint32_t n = 0;
    for (size_t k = 0; k < r->n_prompt; k++)
        n += r->prompt[k] == id;
    for (uint32_t k = 0; k < r->n_tokens[0]; k++)
        n += r->tokens[0][k].id == id;
    return n;
}

/* An id that one stream emits, not as its last token, and no other one meets. */
static int choose_poison(void)
{
    for (victim = 0; victim < N; victim++)
        for (uint32_t k = 1; k + 1 < TOKENS; k++) {
            uint32_t met = 0;
            poison = alone[victim].tokens[0][k].id;
            for (uint32_t i = 0; i < N; i++)
                met += times_met(&alone[i], poison);
            if (met == 1)
                return 1;
        }
    return 0;
}

static void start_both(const char *model)
{
    char kv[128];
    snprintf(kv, sizeof kv, "ipc://%s/kv.sock", cl.dir);
    start_decode(&cl, model, kv, "40");
    start_prefill(&cl, model, CHUNK, "60");
}

static int setup(void **state)
{
    (void)state;
    cluster_open(&cl);
    start_both(SOURCE);
    for (uint32_t i = 0; i < N; i++) {
        request_start(&cl, make(&alone[i], i, 0));
        request_wait(&cl, &alone[i]);
        request_must_succeed(&alone[i]);
    }
    assert_true(choose_poison());
    stop_worker(&cl, 0);
    stop_worker(&cl, 1);
    make_checkpoint(dir, sizeof dir, poison, poison);
    make_checkpoint(broken_dir, sizeof broken_dir, 0, VOCAB - 1);
    start_both(dir);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    stop_worker(&cl, 0);
    stop_worker(&cl, 1);
    cluster_close(&cl);
    remove_checkpoint(dir);
    remove_checkpoint(broken_dir);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(prefill_fails_one), cmocka_unit_test(decode_fails_one),
        cmocka_unit_test(local_prefill_fails_one), cmocka_unit_test(again_and_again),
        cmocka_unit_test(broken_engine_leaves)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
