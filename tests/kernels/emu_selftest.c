/* SPDX-License-Identifier: Apache-2.0 */
/* Guards how `tandem selftest` checks a GPU: in the emulation that runs nothing before it is waited
 * for, with page-locked buffers, every check passes; one kernel that is wrong fails its checks. */
#include "tests/kernels/kernels_util.h"

#include "kernels/checks/gpu.h"
#include "kernels/hip/emu_gpu.h"

static td_gpu_ops inner;
static void *merge;
static int wrong;

/* When wrong, the last head of attention is never joined. */
static int launch_less(td_gpu *g, void *stream, void *kernel, td_gpu_dim dim, const void *args,
                       size_t args_bytes)
{
    if (wrong && kernel == merge)
        dim.grid -= dim.grid > 1;
    return inner.launch(g, stream, kernel, dim, args, args_bytes);
}

static uint32_t failures(const char *group, const td_check_target *t)
{
    uint32_t failed = 0;
    for (const td_check_case *k = td_check_cases; k->name; k++) {
        td_check_result r;
        if (group && strcmp(k->group, group) != 0)
            continue;
        td_check_run(k, t, &r);
        if (r.failed && !wrong)
            printf("%s: %s: %s\n", k->group, k->name, r.text);
        failed += (uint32_t)r.failed;
    }
    return failed;
}

static void a_device_is_checked(void **state)
{
    td_gpu *g = td_emu_gpu_new(64, 2);
    td_check_gpu *c = NULL;
    const td_backend *be = NULL;
    td_err err = {0};
    assert_non_null(g);
    td_emu_gpu_defer(g);
    inner = *g->ops;
    td_gpu_ops seen = inner;
    seen.launch = launch_less;
    g->ops = &seen;
    assert_int_equal(td_gpu_backend_open(g, "emu", &be, &err), 0);
    assert_int_equal(g->ops->kernel(g, "attend_merge", &merge), 0);
    assert_int_equal(td_check_gpu_open(g, be, &c, &err), 0);
    assert_int_equal(failures(NULL, td_check_gpu_target(c)), 0);
    wrong = 1;
    assert_true(failures("attend", td_check_gpu_target(c)) > 0);
    wrong = 0;
    td_check_gpu_close(c);
    assert_ptr_equal(g->ops, &seen);
    td_gpu_backend_close();
    td_gpu_close(g);
}

#ifdef TD_SANITIZED
/* A check that fails leaves what it had open, and here checks fail. */
int __lsan_is_turned_off(void);
int __lsan_is_turned_off(void)
{
    return 1;
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_device_is_checked)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
