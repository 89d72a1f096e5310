/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the promise that a machine without GPU or driver gets an error with a remedy, never a
 * crash. Runs against whatever drivers the machine has; without code objects none can be opened. */
#include "tests/kernels/kernels_util.h"

#include <errno.h>

#include "engine/device.h"
#include "kernels/gpu/gpu.h"

static void no_device_is_an_error(void **state)
{
    for (td_gpu_kind k = TD_GPU_HIP; k < TD_GPU_KINDS; k++) {
        td_gpu *g = NULL;
        td_err err = {0};
        int r = td_gpu_open(k, 0, NULL, 0, &g, &err);
        assert_true(r == -ENOENT || r == -ENODEV || r == -ENOEXEC || r == -ENOSYS || r == -EIO);
        assert_int_equal(err.code, r);
        assert_memory_equal(err.text, td_gpu_kind_name(k), strlen(td_gpu_kind_name(k)));
        assert_null(g);
        print_message("%s\n", err.text);
    }
}

/* Most machines have none: auto is at home there, also under --strict. */
static void auto_takes_the_cpu(void **state)
{
    int absent = 1;
    for (td_gpu_kind k = TD_GPU_HIP; k < TD_GPU_KINDS; k++) {
        td_gpu *g = NULL;
        int r = td_gpu_open(k, 0, NULL, 0, &g, NULL);
        absent &= r == -ENOENT || r == -ENODEV;
    }
    td_device *d = NULL;
    td_device_spec spec = {.word = "auto", .strict = 1};
    if (!absent) {
        print_message("skipped: this machine has a driver\n");
        return;
    }
    assert_int_equal(td_device_open(&spec, &d, NULL), 0);
    assert_null(td_device_backend(d));
    assert_false(td_device_is_fallback(d));
    print_message("%s\n", td_device_text(d));
    td_device_close(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(no_device_is_an_error),
                                       cmocka_unit_test(auto_takes_the_cpu)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
