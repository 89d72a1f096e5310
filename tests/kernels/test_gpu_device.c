/* SPDX-License-Identifier: Apache-2.0 */
/* Guards --device: each word takes what it names or says what is missing; auto says what it took
 * and why, and never passes silently over a GPU that is there. Drivers are stand-ins on this
 * program's library path. */
#include "tests/kernels/kernels_util.h"

#include <errno.h>

#include "engine/device.h"
#include "kernels/gpu/gpu.h"

static const td_gpu_object objects[] = {{"gfx942", "942", 3}, {"sm_90", "none", 4}};

static int open_as(const char *word, const char *isa, int strict, td_device **ret, td_err *err)
{
    td_device_spec spec = {
        .word = word, .isa = isa, .strict = strict, .objects = objects, .n_objects = 2};
    *ret = NULL;
    *err = (td_err){0};
    return td_device_open(&spec, ret, err);
}

static void the_cpu_touches_no_driver(void **state)
{
    td_device *d;
    td_err err;
    assert_int_equal(open_as("cpu", "auto", 1, &d, &err), 0);
    assert_null(td_device_backend(d));
    assert_string_equal(td_device_text(d), "cpu");
    td_device_close(d);
    td_device_close(NULL);
}

static void a_gpu_that_serves_is_taken(void **state)
{
    const char *words[] = {"hip", "auto"};
    setenv("TD_FAKE_HIP", "every_kernel", 1);
    for (int i = 0; i < 2; i++) {
        td_device *d;
        td_err err;
        assert_int_equal(open_as(words[i], i ? NULL : "auto", 1, &d, &err), 0);
        const td_backend *be = td_device_backend(d);
        assert_string_equal(be->name, "hip");
        assert_string_equal(be->isa, "gfx942");
        assert_false(td_device_is_fallback(d));
        assert_string_equal(td_device_text(d), "hip: Fake MI300X, 304 compute units, kernels for "
                                               "gfx942, driver libamdhip64.so.7");
        td_device_close(d); /* and it can be opened again */
    }
}

static void auto_says_why_the_cpu(void **state)
{
    td_device *d;
    td_err err;
    setenv("TD_FAKE_HIP", "no_device", 1);
    assert_int_equal(open_as("auto", "auto", 0, &d, &err), 0);
    assert_null(td_device_backend(d));
    assert_true(td_device_is_fallback(d)); /* the stand-in for libcuda is too old */
    assert_non_null(strstr(td_device_text(d), "cpu: no GPU serves (hip: "));
    assert_non_null(strstr(td_device_text(d), "found no device"));
    assert_non_null(strstr(td_device_text(d), "too old"));
    td_device_close(d);
    assert_int_equal(open_as("auto", "auto", 1, &d, &err), -ENOSYS);
    assert_null(d);
    assert_non_null(strstr(err.text, "--strict"));
    assert_int_equal(open_as("auto", "avx2", 1, &d, &err), 0);
    assert_string_equal(td_device_text(d), "cpu: --isa avx2 names its kernels");
    td_device_close(d);
}

static void a_gpu_without_our_kernels_is_told(void **state)
{
    td_device *d;
    td_err err;
    setenv("TD_FAKE_HIP", "ok", 1);
    assert_int_equal(open_as("auto", "auto", 0, &d, &err), 0);
    assert_true(td_device_is_fallback(d));
    assert_non_null(strstr(td_device_text(d), "has no kernel"));
    td_device_close(d);
    assert_int_equal(open_as("hip", "auto", 0, &d, &err), -ENOEXEC);
    assert_null(d);
    assert_memory_equal(err.text, "--device: hip: ", 15);
}

static void what_cannot_be_is_refused(void **state)
{
    td_device *d;
    td_err err;
    assert_int_equal(open_as("cuda", "auto", 0, &d, &err), -ENOSYS);
    assert_memory_equal(err.text, "--device: ", 10);
    assert_int_equal(open_as("hip", "avx2", 0, &d, &err), -EINVAL);
    assert_non_null(strstr(err.text, "--isa avx2 is for --device cpu"));
    assert_int_equal(open_as("tpu", "auto", 0, &d, &err), -EINVAL);
    assert_null(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_cpu_touches_no_driver),
        cmocka_unit_test(a_gpu_that_serves_is_taken),
        cmocka_unit_test(auto_says_why_the_cpu),
        cmocka_unit_test(a_gpu_without_our_kernels_is_told),
        cmocka_unit_test(what_cannot_be_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
