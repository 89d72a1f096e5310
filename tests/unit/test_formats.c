/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: the small formats of checkpoints are read and written as torch and Quark do, code by
 * code. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/json.h"
#include "kernels/formats.h"

static json_t *golden;

static float float_at(const json_t *a, size_t i)
{
    uint32_t u = (uint32_t)json_integer_value(json_array_get(a, i));
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static void e4m3_is_what_torch_says(void **state)
{
    const json_t *g = json_object_get(golden, "e4m3"), *values = json_object_get(g, "values"),
                 *inputs = json_object_get(g, "inputs"), *codes = json_object_get(g, "codes");
    assert_int_equal(json_array_size(values), 256);
    for (unsigned i = 0; i < 256; i++) {
        const json_t *v = json_array_get(values, i);
        float f = td_e4m3_to_f32((uint8_t)i);
        if (json_is_null(v))
            assert_true(isnan(f));
        else
            assert_true((double)f == json_number_value(v));
    }
    assert_true(json_array_size(inputs) > 700);
    for (size_t i = 0; i < json_array_size(inputs); i++)
        assert_int_equal(td_f32_to_e4m3(float_at(inputs, i)),
                         json_integer_value(json_array_get(codes, i)));
}

static void e4m3_saturates_and_keeps_nan(void **state)
{
    assert_int_equal(td_f32_to_e4m3(449.0f), 0x7e);
    assert_int_equal(td_f32_to_e4m3(-1e30f), 0xfe);
    assert_int_equal(td_f32_to_e4m3(-INFINITY), 0xfe);
    assert_int_equal(td_f32_to_e4m3(NAN) & 0x7f, 0x7f);
    assert_int_equal(td_f32_to_e4m3(-0.0f), 0x80);
}

static void mx_groups_are_what_quark_says(void **state)
{
    const json_t *g = json_object_get(golden, "mx"), *inputs = json_object_get(g, "inputs");
    size_t n = json_array_size(inputs);
    assert_int_equal(n, 64);
    for (size_t i = 0; i < n; i++) {
        const json_t *codes = json_array_get(json_object_get(g, "codes"), i);
        float x[TD_MX_GROUP], back[TD_MX_GROUP];
        uint8_t got[TD_MX_GROUP / 2], scale;
        for (size_t k = 0; k < TD_MX_GROUP; k++)
            x[k] = float_at(json_array_get(inputs, i), k);
        scale = td_mx_scale_even(x);
        assert_int_equal(scale,
                         json_integer_value(json_array_get(json_object_get(g, "scales"), i)));
        td_mx_encode(x, scale, got);
        for (size_t k = 0; k < TD_MX_GROUP / 2; k++)
            assert_int_equal(got[k], json_integer_value(json_array_get(codes, k)));
        /* what was decoded is encoded to the same codes */
        td_mx_decode(got, scale, back);
        for (size_t k = 0; k < TD_MX_GROUP; k++)
            assert_true(fabsf(back[k] - x[k]) <= ldexpf(1.0f, scale - 127));
        uint8_t again[TD_MX_GROUP / 2];
        td_mx_encode(back, scale, again);
        assert_memory_equal(got, again, sizeof got);
    }
}

static void e8m0_is_a_power_of_two(void **state)
{
    for (unsigned c = 0; c < 255; c++)
        assert_true(td_e8m0_to_f32((uint8_t)c) == ldexpf(1.0f, (int)c - 127));
    assert_true(isnan(td_e8m0_to_f32(TD_E8M0_NAN)));
}

static void f16_is_its_definition(void **state)
{
    for (unsigned h = 0; h < 0x10000; h++) {
        int e = (int)(h >> 10 & 31);
        float m = (float)(h & 1023u), want = e ? ldexpf(1024.0f + m, e - 25) : ldexpf(m, -24);
        float got = td_f16_to_f32((uint16_t)h);
        assert_int_equal(!!signbit(got), h >> 15);
        if (e == 31)
            assert_true((h & 1023u) != 0 ? isnan(got) : isinf(got));
        else
            assert_true(fabsf(got) == want);
    }
}

/* Row 130 lies in the second row of blocks, its last block is ragged. */
static void rows_take_their_own_scales(void **state)
{
    enum { K = 160, N = 130 };
    uint8_t codes[K], mx[K / 2], mx_scales[N + 1][K / TD_MX_GROUP];
    float scales[2][2] = {{0, 0}, {0.5f, 4.0f}}, x[2 * K];
    memset(codes, 0x38, sizeof codes); /* 1 */
    td_fp8_decode_row(codes, scales, N, K, 2, x);
    for (size_t i = 0; i < K; i++)
        assert_true(x[2 * i] == (i < 128 ? 0.5f : 4.0f));
    memset(mx, 0x42, sizeof mx); /* 1 and 2 */
    memset(mx_scales, 0, sizeof mx_scales);
    for (size_t g = 0; g < K / TD_MX_GROUP; g++)
        mx_scales[N][g] = (uint8_t)(127 + g);
    td_mx_decode_row(mx, mx_scales, N, K, 1, x);
    for (size_t i = 0; i < K; i++)
        assert_true(x[i] == ldexpf(i % 2 ? 2.0f : 1.0f, (int)(i / TD_MX_GROUP)));
}

static int load(void **state)
{
    td_err err = {0};
    return td_json_load(TD_SOURCE_DIR "/tests/goldens/formats/formats.json", NULL, &golden, &err);
}

static int unload(void **state)
{
    json_decref(golden);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(e4m3_is_what_torch_says),
        cmocka_unit_test(e4m3_saturates_and_keeps_nan),
        cmocka_unit_test(mx_groups_are_what_quark_says),
        cmocka_unit_test(e8m0_is_a_power_of_two),
        cmocka_unit_test(f16_is_its_definition),
        cmocka_unit_test(rows_take_their_own_scales),
    };
    return cmocka_run_group_tests(tests, load, unload);
}
