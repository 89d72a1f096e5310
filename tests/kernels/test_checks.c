/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the checks themselves: each finds a backend whose op is wrong, and says where. */
#include "tests/kernels/kernels_util.h"

#include "base/bug.h"
#include "kernels/checks/checks.h"

static void wrong_gemm(td_queue *q, const td_step *s, const td_gemm *g)
{
    td_backend_ref.gemm(q, s, g);
    g->out[0][0] += 0.5f;
}

static void wrong_moe(td_queue *q, const td_step *s, const td_moe *a)
{
    td_backend_ref.moe(q, s, a);
    a->partial[1] *= 1.5f;
}

static void wrong_route(td_queue *q, const td_step *s, const td_route *a)
{
    td_backend_ref.route(q, s, a);
    uint32_t first = a->experts[0];
    a->experts[0] = a->experts[1];
    a->experts[1] = first;
}

static void wrong_mla(td_queue *q, const td_step *s, const td_attend_mla *a)
{
    td_backend_ref.attend_mla(q, s, a);
    a->o_lat[0] += 0.01f;
}

static void wrong_gqa(td_queue *q, const td_step *s, const td_attend_gqa *a)
{
    td_backend_ref.attend_gqa(q, s, a);
    a->o[1] += 0.01f;
}

static void beside_gqa(td_queue *q, const td_step *s, const td_attend_gqa *a)
{
    td_backend_ref.attend_gqa(q, s, a);
    a->o[(size_t)s->n_rows * a->n_heads * a->dims] = 0.0f; /* one element too far */
}

static void wrong_select(td_queue *q, const td_step *s, const td_index_select *a)
{
    td_backend_ref.index_select(q, s, a);
    a->selected[0] ^= 1;
}

static void wrong_norm(td_queue *q, const td_step *s, float *x, const float *delta,
                       const td_tensor *w, float eps, uint32_t width, float *out, float *out_f32)
{
    td_backend_ref.add_norm(q, s, x, delta, w, eps + 0.1f, width, out, out_f32);
}

static void fails(const char *group, const td_backend *be, const char *says)
{
    td_check_target t = {.backend = be};
    uint32_t failed = 0, said = 0;
    for (const td_check_case *k = td_check_cases; k->name; k++) {
        td_check_result r;
        if (strcmp(k->group, group) != 0)
            continue;
        td_check_run(k, &t, &r);
        failed += (uint32_t)r.failed;
        said += r.failed && strstr(r.text, says);
        if (!r.failed && r.n)
            assert_true(r.error <= r.tolerance);
    }
    if (!failed || !said)
        fail_msg("%s: %u checks failed, %u with the words '%s'", group, failed, said, says);
}

static void each_finds_a_wrong_op(void **state)
{
    td_backend be = td_backend_ref;
    be.gemm = wrong_gemm;
    fails("gemm", &be, "gemm[0] is ");
    fails("share", &be, "product[0] is ");
    be = td_backend_ref;
    be.add_norm = wrong_norm;
    fails("gemm", &be, "norm[0] is ");
    be = td_backend_ref;
    be.moe = wrong_moe;
    fails("moe", &be, "moe[1] is ");
    fails("share", &be, "moe[1] is ");
    be = td_backend_ref;
    be.route = wrong_route;
    fails("moe", &be, "experts");
    be = td_backend_ref;
    be.attend_mla = wrong_mla;
    fails("attend", &be, "o_lat[0] is ");
    fails("share", &be, "o_lat[0] is ");
    be.attend_mla = td_backend_ref.attend_mla;
    be.attend_gqa = wrong_gqa;
    fails("attend", &be, "o[1] is ");
    be.attend_gqa = beside_gqa;
    fails("attend", &be, "written behind a buffer");
    be = td_backend_ref;
    be.index_select = wrong_select;
    fails("index", &be, "sel");
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
    const struct CMUnitTest tests[] = {cmocka_unit_test(each_finds_a_wrong_op)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
