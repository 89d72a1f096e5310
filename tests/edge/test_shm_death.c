/* SPDX-License-Identifier: Apache-2.0 */
/* Promises 2 and 3 where KV blocks go through shared memory, on real processes: whoever is killed
 * while blocks are lent or copied, the other one ends the request with a typed status, keeps
 * neither block nor mapping nor descriptor of it, and the next pair gives the very tokens of one
 * process. */
#define MODEL TD_SOURCE_DIR "/tests/goldens/models/glm-shared"

#include <dirent.h>

#include "tests/edge/reference.h"

enum { PREFILL, DECODE, N_TIMES = 8, LONG = 1500, POOL_BLOCKS = 60 };

static cluster cl;
static request rq;
static uint32_t serial;

static request *fresh(size_t n_prompt)
{
    request *r = &rq;
    td_rng rng = {.seed = 31 + serial};
    memset(r, 0, sizeof *r);
    r->n_prompt = n_prompt;
    for (size_t k = 0; k < n_prompt; k++)
        r->prompt[k] = (uint32_t)td_rng_below(&rng, 250);
    r->max_tokens = 8;
    r->temperature = 0.8f;
    r->repetition_penalty = 1;
    r->seed = serial;
    memset(r->prefix_key, (int)(1 + serial % 250), 32);
    snprintf(r->id, sizeof r->id, "d%u", serial++);
    return r;
}

static void must_work(void)
{
    token want[TOKENS_MAX];
    request *r = fresh(70 + serial * 13 % 200);
    reference(r, 0, want);
    request_start(&cl, r);
    request_wait(&cl, r);
    request_must_succeed(r);
    assert_int_equal(r->n_tokens[0], 8);
    assert_memory_equal(r->tokens[0], want, 8 * sizeof *want);
}

static int n_fds(int role)
{
    char path[64];
    int n = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)cl.pid[role]);
    DIR *d = opendir(path);
    assert_non_null(d);
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

/* Mappings of memory that can be lent: its own pool, and those of others with their words. */
static int n_pools(int role)
{
    char path[64], line[512];
    int n = 0;
    snprintf(path, sizeof path, "/proc/%d/maps", (int)cl.pid[role]);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f))
        n += strstr(line, "/memfd:tandem-kv") != NULL;
    fclose(f);
    return n;
}

static void wait_for(int (*what)(int role), int role, int want, const char *name)
{
    for (uint64_t end = td_now_us() + 20 * TD_S; what(role) != want;) {
        if (td_now_us() > end)
            fail_msg("worker %d has %d %s, not %d", role, what(role), name, want);
        cluster_turn(&cl);
        usleep(1000);
    }
}

static void turn_for(uint64_t us)
{
    for (uint64_t end = td_now_us() + us; td_now_us() < end;)
        cluster_turn(&cl);
}

static void start(int role)
{
    char kv[128];
    snprintf(kv, sizeof kv, "ipc://%s/kv.sock", cl.dir);
    if (role == DECODE)
        start_decode(&cl, MODEL, kv, "60");
    else
        start_prefill(&cl, MODEL, "64", "60");
}

static void kill_worker(int role)
{
    kill(cl.pid[role], SIGKILL);
    waitpid(cl.pid[role], NULL, 0);
    wait_session(&cl, role, 0);
}

/* Both start with a pair that has worked: then there is a line between them. */
static void kill_again_and_again(int role)
{
    int other = !role;
    must_work();
    int fds = n_fds(other), pools = n_pools(other);
    uint64_t whole_us = td_now_us();
    request *r = fresh(LONG);
    request_start(&cl, r);
    request_wait(&cl, r);
    request_must_succeed(r);
    whole_us = td_now_us() - whole_us;
    for (int i = 0; i < N_TIMES; i++) {
        r = fresh(LONG);
        request_start(&cl, r);
        turn_for(whole_us * (uint64_t)i / N_TIMES);
        kill_worker(role);
        request_wait(&cl, r);
        for (int leg = 0; leg < 2; leg++) {
            if (r->code[leg] != TD_OK && r->code[leg] != TD_UNAVAILABLE &&
                r->code[leg] != TD_CANCELLED && r->code[leg] != TD_ABORTED &&
                r->code[leg] != TD_FAILED_PRECONDITION)
                fail_msg("leg %d ended with %s: %s", leg, td_code_name(r->code[leg]), r->why[leg]);
        }
        assert_int_equal(r->broken, 0);
        if (role == PREFILL) /* its pool is not mapped any longer than it lives */
            wait_for(n_pools, other, 1, "mappings");
        start(role);
        must_work();
        wait_for(n_fds, other, fds, "descriptors");
        wait_for(n_pools, other, pools, "mappings");
    }
}

static void test_lender_is_killed(void **state)
{
    (void)state;
    kill_again_and_again(PREFILL);
}

static void test_reader_is_killed(void **state)
{
    (void)state;
    kill_again_and_again(DECODE);
}

/* The decode worker offers none, the prefill worker must: an error that says so, and no block. */
static void test_error_by_name(void **state)
{
    (void)state;
    stop_worker(&cl, DECODE);
    setenv("TANDEM_DECODE_KV_TRANSPORT", "zmq", 1);
    start(DECODE);
    request *r = fresh(100);
    request_start(&cl, r);
    request_wait(&cl, r);
    assert_int_equal(r->code[0], TD_FAILED_PRECONDITION);
    if (!strstr(r->why[0], "shm_not_offered"))
        fail_msg("%s", r->why[0]);
    assert_int_equal(r->committed, 0);
}

static int setup(void **state)
{
    (void)state;
    reference_open();
    setenv("TANDEM_PREFILL_KV_TRANSPORT", "shm", 1);
    setenv("TANDEM_DECODE_KV_TRANSPORT", "shm", 1);
    cluster_open(&cl);
    start(DECODE);
    start(PREFILL);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    stop_worker(&cl, 0);
    stop_worker(&cl, 1);
    cluster_close(&cl);
    reference_close();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lender_is_killed),
        cmocka_unit_test(test_reader_is_killed),
        cmocka_unit_test(test_error_by_name),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
