/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: rows that are packed 16 at a time give the bytes of rows packed one by one, in every
 * format, at ragged shapes and with e4m3's NaN. */
#include "tests/kernels/kernels_util.h"

static const struct shape {
    uint32_t n, k;
} shapes[] = {{16, 32}, {33, 64}, {160, 160}, {7, 96}, {272, 288}, {48, 1024}};

static uint8_t codes[272 * 1024 * 4], scales[272 * 1024];

static td_weight_src source(td_weight_format f, struct shape s)
{
    static const td_dtype types[] = {
        [TD_W_F32] = TD_F32, [TD_W_BF16] = TD_BF16, [TD_W_FP8] = TD_F8E4M3, [TD_W_MXFP4] = TD_U8};
    for (size_t i = 0; i < sizeof codes; i++)
        codes[i] = (uint8_t)td_rng_next(&rng);
    for (size_t i = 0; i < sizeof scales; i++)
        scales[i] = (uint8_t)(f == TD_W_MXFP4 ? 100 + td_rng_next(&rng) % 50
                              : i % 4 < 2     ? i
                                              : 0x3f);
    return (td_weight_src){.dtype = types[f],
                           .base = codes,
                           .scales = f == TD_W_FP8 || f == TD_W_MXFP4 ? scales : NULL,
                           .n_stride = f == TD_W_MXFP4 ? s.k / 2 : s.k,
                           .k_stride = 1};
}

static void check(const td_backend *be, td_weight_format f, struct shape s)
{
    td_tensor *whole = NULL, *single = NULL;
    td_weight_src src = source(f, s);
    assert_int_equal(be->weight_new(f, 1, s.n, s.k, &whole), 0);
    assert_int_equal(be->weight_new(f, 1, s.n, s.k, &single), 0);
    be->weight_fill(whole, 0, 0, s.n, &src);
    td_weight_src row = src;
    for (uint32_t n = 0; n < s.n; n++) {
        row.base = codes + (size_t)n * src.n_stride * td_dtype_bytes(src.dtype);
        be->weight_fill(single, 0, n, 1, &row);
    }
    assert_int_equal(be->weight_bytes(whole), be->weight_bytes(single));
    assert_memory_equal(be->weight_packed(whole), be->weight_packed(single),
                        be->weight_bytes(whole));
    be->weight_free(whole);
    be->weight_free(single);
}

static void panels_hold_what_single_rows_hold(void **state)
{
    const td_backend *be = td_backend_get("auto");
    if (!be->weight_packed)
        skip(); /* this machine has no packed kernels */
    for (unsigned f = 0; f < TD_WEIGHT_FORMATS; f++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            check(be, (td_weight_format)f, shapes[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(panels_hold_what_single_rows_hold)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
