/* SPDX-License-Identifier: Apache-2.0 */
#include "cli/gpu.h"

#include <errno.h>
#include <string.h>

#include "kernels/gpu/objects.h"

#include "base/banned.h"

static int open_kind(td_gpu_kind kind, td_gpu **ret_gpu, const td_backend **ret_backend,
                     td_err *err)
{
    size_t n = 0;
    const td_gpu_object *objects = td_gpu_objects(&n);
    td_gpu *g = NULL;
    int r = td_gpu_open(kind, 0, objects, n, &g, err);
    r = r < 0 ? r : td_gpu_backend_open(g, td_gpu_kind_name(kind), ret_backend, err);
    if (r < 0) {
        td_gpu_close(g);
        return r;
    }
    *ret_gpu = g;
    return 0;
}

int td_cli_gpu_open(const char *word, td_gpu **ret_gpu, const td_backend **ret_backend,
                    td_err *reterr_err)
{
    td_err why[TD_GPU_KINDS] = {0};
    for (td_gpu_kind k = TD_GPU_HIP; k < TD_GPU_KINDS; k++)
        if (strcmp(word, td_gpu_kind_name(k)) == 0)
            return open_kind(k, ret_gpu, ret_backend, reterr_err);
    for (td_gpu_kind k = TD_GPU_HIP; k < TD_GPU_KINDS; k++)
        if (open_kind(k, ret_gpu, ret_backend, &why[k]) == 0)
            return 0;
    return td_err_set(reterr_err, -ENODEV, "no GPU serves: %.200s; %.200s", why[TD_GPU_HIP].text,
                      why[TD_GPU_CUDA].text);
}

void td_cli_gpu_close(td_gpu *g)
{
    if (!g)
        return;
    td_gpu_backend_close();
    td_gpu_close(g);
}
