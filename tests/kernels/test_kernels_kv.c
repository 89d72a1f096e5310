/* SPDX-License-Identifier: Apache-2.0 */
/* Guards FP8 rows of the KV pool: kernels/checks/kv.c on every backend, where every vector
 * instruction set gives the bits of the first, by other loops where queries are few; and how many
 * bytes rows take, counted apart from kernels/kv_row.h. */
#include "tests/kernels/checks_util.h"

#include "kernels/kv_row.h"

/* Rows of elems elements in parts of part elements (the last may be shorter); groups of 128 begin
 * anew with each part. */
typedef struct form {
    uint32_t elems, part;
} form;

static uint32_t scales_of(const form *f)
{
    uint32_t last = f->elems - 1;
    return last / f->part * ((f->part + 127) / 128) + last % f->part / 128 + 1;
}

static void bytes_are_counted_as_here(void **state)
{
    static const form forms[] = {{576, 512}, {32, 24}, {240, 200}, {2 * 8 * 128, 128}, {80, 20}};
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        const form *f = &forms[i];
        td_kv_row r = i < 3 ? td_kv_row_mla(TD_F8E4M3, f->part, f->elems - f->part)
                            : td_kv_row_gqa(TD_F8E4M3, f->elems / f->part / 2, f->part);
        assert_int_equal(r.n_scales, scales_of(f));
        assert_int_equal(r.bytes, f->elems);
        assert_int_equal(r.scales_at, 64 * f->elems);
        assert_int_equal(r.layer_bytes, 64 * (f->elems + 4 * scales_of(f)));
    }
    td_kv_row half = td_kv_row_gqa(TD_BF16, 8, 128);
    assert_int_equal(half.n_scales, 0);
    assert_int_equal(half.layer_bytes, 64 * 2 * 8 * 128 * 2);
}

/* Lane orders of a wave size agree; waves of 32 add in another order. */
#ifdef TD_TEST_EMU
#define WAVE_OF_32 (emulated->wave == 32)
#else
#define WAVE_OF_32 0
#endif

static void run_and_compare_bits(void **state)
{
    static uint64_t first[2][CHECKS_MAX];
    td_check_target t = {.backend = under, .matrix = MATRIX};
    const td_check_case *k = *state;
    td_check_result r;
    td_check_run(k, &t, &r);
    if (r.failed)
        fail_msg("%s", r.text);
    if (under == &td_backend_ref)
        return;
    uint64_t *f = &first[WAVE_OF_32][k - td_check_cases];
    if (!*f)
        *f = r.bits;
    assert_int_equal(r.bits, *f);
}

int main(void)
{
    struct CMUnitTest tests[CHECKS_MAX] = {0};
    size_t n = checks_of("kv", tests);
    for (size_t i = 0; i < n; i++)
        tests[i].test_func = run_and_compare_bits;
    tests[n] = (struct CMUnitTest)cmocka_unit_test(bytes_are_counted_as_here);
    RUN_FOR_EVERY_ISA(tests);
}
