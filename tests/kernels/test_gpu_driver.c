/* SPDX-License-Identifier: Apache-2.0 */
/* Guards kernels/gpu against drivers that are stand-ins on this program's library path: symbols and
 * parameters as in ROCm's headers, the object that fits is the one that loads, every failure is a
 * text that names the step, nothing crashes. */
#include "tests/kernels/kernels_util.h"

#include <errno.h>

#include "kernels/gpu/gpu.h"

static const td_gpu_object objects[] = {
    {"sm_90", "90", 2}, {"gfx950", "950", 3}, {"gfx942", "942", 3}};

typedef struct fill_args {
    uint32_t *out;
    uint32_t n, value;
} fill_args;

static int open_as(const char *mode, uint32_t ordinal, td_gpu **ret_gpu, td_err *err)
{
    setenv("TD_FAKE_HIP", mode, 1);
    return td_gpu_open(TD_GPU_HIP, ordinal, objects, 3, ret_gpu, err);
}

static void the_object_that_fits_is_loaded(void **state)
{
    const char *modes[] = {"ok", "gfx950"}, *archs[] = {"gfx942", "gfx950"};
    for (int i = 0; i < 2; i++) {
        td_gpu *g = NULL;
        td_err err = {0};
        assert_int_equal(open_as(modes[i], (uint32_t)i, &g, &err), 0);
        assert_string_equal(g->arch, archs[i]);
        assert_string_equal(g->name, i ? "Fake MI355X" : "Fake MI300X");
        assert_string_equal(g->driver, "libamdhip64.so.7");
        assert_int_equal(g->wave, 64);
        assert_int_equal(g->n_cus, 304);
        assert_int_equal(g->lds_bytes, 65536);
        td_gpu_close(g);
    }
}

static void set_one(void *arg)
{
    *(int *)arg = 1;
}

static void every_call_reaches_the_driver(void **state)
{
    td_gpu *g = NULL;
    td_err err = {0};
    assert_int_equal(open_as("ok", 0, &g, &err), 0);
    const td_gpu_ops *o = g->ops;
    void *stream = NULL, *from = NULL, *to = NULL, *kernel = NULL, *graph = NULL;
    assert_int_equal(o->use(g), 0);
    assert_int_equal(o->stream_new(g, &stream), 0);
    assert_int_equal(o->event_new(g, &from), 0);
    assert_int_equal(o->event_new(g, &to), 0);
    size_t left = 0, total = 0;
    assert_int_equal(o->mem_info(g, &left, &total), 0);
    assert_true(left == 1 << 20 && total == 2 << 20);

    uint32_t *host = o->host_alloc(g, 16 * 4), *a = o->mem_alloc(g, 16 * 4),
             *b = o->mem_alloc(g, 16 * 4);
    for (uint32_t i = 0; i < 16; i++)
        host[i] = i;
    assert_int_equal(o->upload(g, stream, a, host, 64), 0);
    assert_int_equal(o->fill(g, stream, a, 0xff, 4), 0);
    assert_int_equal(o->copy(g, stream, b, a, 64), 0);
    assert_int_equal(o->kernel(g, "fill", &kernel), 0);
    fill_args args = {b + 1, 3, 77};
    assert_int_equal(o->launch(g, stream, kernel, (td_gpu_dim){1, 64, 0}, &args, sizeof args), 0);
    assert_int_equal(o->event_done(g, from), 0);
    assert_int_equal(o->event_record(g, from, stream), 0);
    assert_int_equal(o->event_after(g, stream, from), 0);
    assert_int_equal(o->event_record(g, to, stream), 0);
    assert_int_equal(o->event_done(g, to), 1);
    assert_int_equal(o->event_wait(g, to), 0);
    float ms = 0;
    assert_int_equal(o->event_ms(g, from, to, &ms), 0);
    assert_true(ms > 1.4f && ms < 1.6f);

    int called = 0;
    assert_int_equal(o->host_call(g, stream, set_one, &called), 0);
    assert_int_equal(called, 1);

    args.value = 5;
    args.n = 1;
    assert_int_equal(o->graph_begin(g, stream), 0);
    assert_int_equal(o->launch(g, stream, kernel, (td_gpu_dim){1, 64, 0}, &args, sizeof args), 0);
    assert_int_equal(o->graph_end(g, stream, &graph), 0);
    assert_int_equal(o->download(g, stream, host, b, 64), 0);
    assert_int_equal(o->stream_wait(g, stream), 0);
    assert_true(host[0] == UINT32_MAX && host[1] == 77 && host[3] == 77 && host[4] == 4);
    assert_int_equal(o->graph_launch(g, stream, graph), 0);
    assert_int_equal(o->download(g, stream, host, b, 64), 0);
    assert_true(host[1] == 5 && host[2] == 77);

    o->graph_free(g, graph);
    o->host_free(g, host);
    o->mem_free(g, a);
    o->mem_free(g, b);
    o->event_free(g, from);
    o->event_free(g, to);
    o->stream_free(g, stream);
    td_gpu_close(g);
}

static void a_failure_says_what_and_why(void **state)
{
    td_gpu *g = NULL;
    td_err err = {0};
    assert_int_equal(open_as("ok", 0, &g, &err), 0);
    void *stream = NULL, *kernel = NULL;
    assert_int_equal(g->ops->stream_new(g, &stream), 0);
    assert_int_equal(g->ops->kernel(g, "nothing", &kernel), -ENOENT);
    assert_non_null(strstr(g->error, "nothing"));
    assert_int_equal(g->ops->kernel(g, "fill", &kernel), 0);
    fill_args args = {0};
    setenv("TD_FAKE_HIP", "launch_fails", 1);
    assert_int_equal(g->ops->launch(g, stream, kernel, (td_gpu_dim){1, 64, 0}, &args, sizeof args),
                     -EIO);
    assert_string_equal(g->error, "hip: launching a kernel: unspecified launch failure (719)");
    setenv("TD_FAKE_HIP", "no_memory", 1);
    assert_null(g->ops->mem_alloc(g, 64));
    assert_non_null(strstr(g->error, "device memory"));
    g->ops->stream_free(g, stream);
    td_gpu_close(g);
}

static void what_cannot_be_opened_is_refused_by_name(void **state)
{
    td_gpu *g = NULL;
    td_err err = {0};
    assert_int_equal(open_as("no_device", 0, &g, &err), -ENODEV);
    assert_non_null(strstr(err.text, "found no device"));
    assert_int_equal(open_as("ok", 2, &g, &err), -ENODEV);
    assert_non_null(strstr(err.text, "no device 2, only 0 to 1"));
    assert_int_equal(open_as("wave32", 0, &g, &err), -ENODEV);
    assert_non_null(strstr(err.text, "32 lanes"));
    setenv("TD_FAKE_HIP", "ok", 1);
    assert_int_equal(td_gpu_open(TD_GPU_HIP, 0, objects, 1, &g, &err), -ENOEXEC);
    assert_non_null(strstr(err.text, "holds no kernels"));
    assert_int_equal(td_gpu_open(TD_GPU_HIP, 0, objects, 2, &g, &err), -ENOEXEC);
    assert_non_null(strstr(err.text, "gfx950"));
    /* an old library */
    assert_int_equal(td_gpu_open(TD_GPU_CUDA, 0, objects, 3, &g, &err), -ENOSYS);
    assert_non_null(strstr(err.text, "cuDeviceGetCount"));
    assert_null(g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_object_that_fits_is_loaded),
        cmocka_unit_test(every_call_reaches_the_driver),
        cmocka_unit_test(a_failure_says_what_and_why),
        cmocka_unit_test(what_cannot_be_opened_is_refused_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
