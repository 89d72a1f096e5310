/* SPDX-License-Identifier: Apache-2.0 */
/* Guards route and moe on every backend: kernels/checks/moe.c and experts.c say what. */
#include "tests/kernels/checks_util.h"

enum { D = 96, I = 128, IS = 64, SLICES = 2, ROWS = 30 };

/* One expert and a shared one, of the same codes whoever is under test. */
static void run_int8(const char *isa, float *ret_partial)
{
    under = td_backend_get(isa);
    rng = (td_rng){7, 0};
    double *values = malloc(sizeof *values * D * I);
    static const uint32_t shapes[6][2] = {{I, D}, {I, D}, {D, I}, {IS, D}, {IS, D}, {D, IS}};
    td_tensor *w[6];
    assert_non_null(values);
    for (int i = 0; i < 6; i++)
        w[i] = weight_random(TD_W_MXFP4, shapes[i][0], shapes[i][1], values);
    free(values);
    float *a = random_floats(ROWS * D, 1), *weights = random_floats(ROWS, 0);
    uint32_t *experts = words(ROWS);
    memset(experts, 0, ROWS * sizeof *experts);
    td_moe m = {.a = a,
                .experts = experts,
                .weights = weights,
                .n_experts = 1,
                .top_k = 1,
                .gate = w[0],
                .up = w[1],
                .down = w[2],
                .shared_gate = w[3],
                .shared_up = w[4],
                .shared_down = w[5],
                .slices = SLICES,
                .act = floats(td_moe_act_elems(ROWS, 1, I, IS)),
                .partial = ret_partial};
    td_queue *q = open_queue(TD_BF16, 1);
    td_step st = {.n_rows = ROWS};
    under->moe(q, &st, &m);
    under->close(q);
    for (int i = 0; i < 6; i++)
        under->weight_free(w[i]);
}

/* From the operand to the slices' sums nothing rounds differently: sums of int8 are exact and the
 * scales of MXFP4 powers of two. */
static void int8_experts_have_the_reference_bits(void **state)
{
    under_i8 = 1;
    for (int i = 1; i < ISAS; i++) {
        if (!td_backend_get(all_isas[i]))
            continue;
        float *want = floats(SLICES * ROWS * D), *got = floats(SLICES * ROWS * D);
        run_int8("ref", want);
        run_int8(all_isas[i], got);
        assert_memory_equal(got, want, SLICES * ROWS * D * sizeof *got);
        check_guards();
    }
    under_i8 = 0;
}

int main(void)
{
    const struct CMUnitTest bits[] = {cmocka_unit_test(int8_experts_have_the_reference_bits)};
    int failed = cmocka_run_group_tests(bits, NULL, NULL);
    if (failed)
        return failed;
    RUN_CHECKS("moe");
}
