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

/* FP8 rows: a code, a scale, a row of the wrong position; what is read back. */
static void wrong_gqa_write(td_queue *q, const td_step *s, const td_gqa_write *a)
{
    td_backend_ref.gqa_write(q, s, a);
    uint8_t *block = s->kv_base + s->tables[s->positions[0] / 64] * s->block_bytes;
    block[a->layer_offset + s->positions[0] % 64 * 2 * a->n_kv_heads * a->dims +
          (size_t)a->n_kv_heads * a->dims + 6] ^= 1;
}

static void wrong_mla_write(td_queue *q, const td_step *s, const td_mla_write *a)
{
    td_mla_write off = *a;
    off.eps += 0.2f;
    td_backend_ref.mla_write(q, s, &off);
}

static void wrong_mla_of_fp8(td_queue *q, const td_step *s, const td_attend_mla *a)
{
    td_backend_ref.attend_mla(q, s, a);
    if (a->kv == TD_F8E4M3)
        a->o_lat[3] *= 1.0001f;
}

static void wrong_gqa_of_fp8(td_queue *q, const td_step *s, const td_attend_gqa *a)
{
    td_backend_ref.attend_gqa(q, s, a);
    if (a->kv == TD_F8E4M3)
        a->o[2] *= 1.0001f;
}

static void blind_gqa_of_fp8(td_queue *q, const td_step *s, const td_attend_gqa *a)
{
    td_backend_ref.attend_gqa(q, s, a);
    for (uint32_t i = 0; a->kv == TD_F8E4M3 && i < s->n_rows * a->n_heads * a->dims; i++)
        a->o[i] = isnan(a->o[i]) ? 0.0f : a->o[i];
}

/* Says that it rounds operands to e4m3, and does not. */
static int open_unscaled(const td_backend_options *o, td_queue **ret_queue, td_err *reterr_err)
{
    td_backend_options plain = *o;
    plain.act_fp8 = 0;
    return td_backend_ref.open(&plain, ret_queue, reterr_err);
}

/* A row that knows its company. */
static void gemm_by_rows(td_queue *q, const td_step *s, const td_gemm *g)
{
    td_backend_ref.gemm(q, s, g);
    if (s->n_rows == 3)
        g->out[0][2] += 0.5f;
}

static void blind_gemm(td_queue *q, const td_step *s, const td_gemm *g)
{
    td_backend_ref.gemm(q, s, g);
    for (uint32_t i = 0; g->epilogue == TD_EPI_F32 && i < s->n_rows * g->out_stride[0]; i++)
        g->out[0][i] = isnan(g->out[0][i]) ? 0.0f : g->out[0][i];
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

/* Some check of the group fails with these words; name: that one, not another. */
static void fails_in(const char *group, const char *name, const td_backend *be, const char *says)
{
    td_check_target t = {.backend = be};
    uint32_t failed = 0, said = 0;
    for (const td_check_case *k = td_check_cases; k->name; k++) {
        td_check_result r;
        if (strcmp(k->group, group) != 0 || (name && !strstr(k->name, name)))
            continue;
        td_check_run(k, &t, &r);
        assert_int_equal(r.skipped, 0);
        failed += (uint32_t)r.failed;
        said += r.failed && strstr(r.text, says);
        if (!r.failed && r.n)
            assert_true(r.error <= r.tolerance);
    }
    if (!failed || !said)
        fail_msg("%s: %u checks failed, %u with the words '%s'", group, failed, said, says);
}

static void fails(const char *group, const td_backend *be, const char *says)
{
    fails_in(group, NULL, be, says);
}

static void each_finds_a_wrong_op(void **state)
{
    td_backend be = td_backend_ref;
    be.gemm = wrong_gemm;
    fails("gemm", &be, "gemm[0] is ");
    fails_in("share", "GLM-5.2's products", &be, "product[0] is ");
    fails_in("share", "MXFP4 products", &be, "product[0] is ");
    fails_in("share", "part of FP8", &be, "of part is");
    be = td_backend_ref;
    be.add_norm = wrong_norm;
    fails("gemm", &be, "norm[0] is ");
    be = td_backend_ref;
    be.moe = wrong_moe;
    fails("moe", &be, "moe[1] is ");
    fails_in("share", "GLM-5.2's experts", &be, "moe[1] is ");
    fails_in("share", "MXFP4 experts", &be, "moe[1] is ");
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

static void each_finds_a_wrong_fp8_row(void **state)
{
    td_backend be = td_backend_ref;
    be.gqa_write = wrong_gqa_write;
    fails_in("kv", "to the bit", &be, "row[");
    be = td_backend_ref;
    be.mla_write = wrong_mla_write;
    fails_in("kv", "latent rows", &be, "row[");
    be = td_backend_ref;
    be.attend_mla = wrong_mla_of_fp8;
    fails_in("kv", "they stand for", &be, "o[0]");
    fails_in("kv", "GLM-5.2", &be, "o[0]");
    be = td_backend_ref;
    be.attend_gqa = wrong_gqa_of_fp8;
    fails_in("kv", "they stand for", &be, "o[0]");
    fails_in("kv", "GLM-5.2", &be, "o[0]");
    be.attend_gqa = blind_gqa_of_fp8;
    fails_in("kv", "NaN", &be, "isnan");
}

static void each_finds_a_wrong_scaled_product(void **state)
{
    td_backend be = td_backend_ref;
    be.act_fp8 = 1;
    be.open = open_unscaled;
    fails_in("scaled", "read back", &be, "operand[");
    fails_in("scaled", "products", &be, "scaled[");
    fails_in("scaled", "experts", &be, "expert[");
    be.gemm = gemm_by_rows;
    fails_in("scaled", "slices", &be, "of g.out[0] is");
    be.gemm = blind_gemm;
    fails_in("scaled", "NaN", &be, "isnan");
}

/* What a backend lacks is told, not passed. */
static void what_is_not_there_is_skipped(void **state)
{
    td_check_target t = {.backend = &td_backend_ref};
    uint32_t skipped = 0;
    for (const td_check_case *k = td_check_cases; k->name; k++) {
        td_check_result r;
        if (strcmp(k->group, "scaled") != 0)
            continue;
        td_check_run(k, &t, &r);
        assert_true(r.skipped && !r.failed);
        skipped++;
    }
    assert_int_equal(skipped, 5);
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
    const struct CMUnitTest tests[] = {cmocka_unit_test(each_finds_a_wrong_op),
                                       cmocka_unit_test(each_finds_a_wrong_fp8_row),
                                       cmocka_unit_test(each_finds_a_wrong_scaled_product),
                                       cmocka_unit_test(what_is_not_there_is_skipped)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
