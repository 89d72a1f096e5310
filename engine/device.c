/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/device.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/gpu/backend.h"
#include "kernels/gpu/objects.h"

#include "base/banned.h"

struct td_device {
    td_gpu *gpu; /* NULL: the CPU */
    const td_backend *backend;
    int fallback;
    char text[640];
};

static int open_gpu(td_device *d, td_gpu_kind kind, const td_device_spec *spec, td_err *err)
{
    size_t n = spec->n_objects;
    const td_gpu_object *objects = spec->objects ? spec->objects : td_gpu_objects(&n);
    int r = td_gpu_open(kind, 0, objects, n, &d->gpu, err);
    if (r < 0)
        return r;
    r = td_gpu_backend_open(d->gpu, td_gpu_kind_name(kind), &d->backend, err);
    if (r < 0) {
        td_gpu_close(d->gpu);
        d->gpu = NULL;
        if (r == -ENOENT) /* not to be taken for a missing driver */
            err->code = r = -ENOEXEC;
        return r;
    }
    snprintf(d->text, sizeof d->text, "%s: %s, %u compute units, kernels for %s, driver %s",
             td_gpu_kind_name(kind), d->gpu->name, d->gpu->n_cus, d->gpu->arch, d->gpu->driver);
    return 0;
}

/* No driver or no device is how most machines are; all else is a GPU that should have served. */
static int is_absence(int code)
{
    return code == -ENOENT || code == -ENODEV;
}

static int open_any(td_device *d, const td_device_spec *spec, td_err *err)
{
    td_err why[TD_GPU_KINDS] = {0};
    for (td_gpu_kind k = TD_GPU_HIP; k < TD_GPU_KINDS; k++) {
        int r = open_gpu(d, k, spec, &why[k]);
        if (r == 0)
            return 0;
        if (is_absence(r))
            continue;
        d->fallback = 1;
        if (spec->strict)
            return td_err_set(err, r, "--device auto: %s; --strict forbids the CPU in its place",
                              why[k].text);
    }
    snprintf(d->text, sizeof d->text, "cpu: no GPU serves (%.300s; %.300s)", why[TD_GPU_HIP].text,
             why[TD_GPU_CUDA].text);
    return 0;
}

static int take(td_device *d, const td_device_spec *spec, td_err *err)
{
    int named = spec->isa && strcmp(spec->isa, "auto") != 0;
    if (strcmp(spec->word, "cpu") == 0) {
        snprintf(d->text, sizeof d->text, "cpu");
        return 0;
    }
    if (strcmp(spec->word, "auto") == 0) {
        if (!named)
            return open_any(d, spec, err);
        snprintf(d->text, sizeof d->text, "cpu: --isa %s names its kernels", spec->isa);
        return 0;
    }
    for (td_gpu_kind k = TD_GPU_HIP; k < TD_GPU_KINDS; k++) {
        if (strcmp(spec->word, td_gpu_kind_name(k)) != 0)
            continue;
        if (named)
            return td_err_set(err, -EINVAL, "--isa %s is for --device cpu; leave it out",
                              spec->isa);
        return open_gpu(d, k, spec, err) < 0 ? td_err_prefix(err, "--device") : 0;
    }
    return td_err_set(err, -EINVAL, "--device %s is not known; use cpu, hip, cuda or auto",
                      spec->word);
}

int td_device_open(const td_device_spec *spec, td_device **ret_device, td_err *reterr_err)
{
    td_err err = {0};
    td_device *d = calloc(1, sizeof *d);
    if (!d)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    int r = take(d, spec, &err);
    if (r < 0) {
        td_device_close(d);
        return td_err_set(reterr_err, r, "%s", err.text);
    }
    *ret_device = d;
    return 0;
}

const td_backend *td_device_backend(const td_device *d)
{
    return d->backend;
}

const char *td_device_text(const td_device *d)
{
    return d->text;
}

int td_device_is_fallback(const td_device *d)
{
    return d->fallback;
}

const char *td_device_error(const td_device *d)
{
    return d->gpu ? d->gpu->error : "";
}

void td_device_close(td_device *d)
{
    if (!d)
        return;
    if (d->gpu) {
        td_gpu_backend_close();
        td_gpu_close(d->gpu);
    }
    free(d);
}
