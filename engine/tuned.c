/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/tuned.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/shapes.h"
#include "kernels/gpu/backend.h"

#include "base/banned.h"

struct td_tuning {
    td_tuned *table;
    td_tune_chooser *chooser;
    uint32_t cus;
};

int td_tuning_open(const td_backend *be, const char *dir, td_tuning **ret_tuning,
                   td_err *reterr_err)
{
    td_tuning *t = be ? calloc(1, sizeof *t) : NULL;
    if (be && !t)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    int r = t ? td_tuned_load(dir, be->isa, &t->table, reterr_err) : 0;
    if (t && r >= 0 && td_tune_chooser_new(t->table, &t->chooser) < 0)
        r = td_err_set(reterr_err, -ENOMEM, "out of memory");
    if (r < 0) {
        td_tuning_close(t);
        return td_err_prefix(reterr_err, "--tuned");
    }
    if (t) {
        t->cus = td_gpu_backend_cus();
        td_gpu_backend_tuned(t->chooser);
    }
    *ret_tuning = t;
    return 0;
}

int td_tuning_require(const td_tuning *t, const char *dir, uint32_t max_rows, int act_fp8,
                      td_err *reterr_err)
{
    static const uint32_t one[] = {1};
    td_shapes s = {0};
    td_tune_key first;
    char text[200];
    int r = t ? td_shapes_add(dir, one, 1, act_fp8, &s, reterr_err) : 0;
    size_t n = t && r >= 0 ? td_shapes_untuned(&s, t->table, t->cus, max_rows, &first, 1) : 0;
    td_shapes_done(&s);
    if (r < 0 || n == 0)
        return r;
    td_tune_key_text(&first, text, sizeof text);
    return td_err_set(reterr_err, -EINVAL,
                      "%zu launches have no tuned plan for %s with %u compute units (the first: "
                      "%s) and --strict is set; measure them with tandem tune and name its folder "
                      "with --tuned",
                      n, t->table->arch, t->cus, text);
}

size_t td_tuning_untuned(const td_tuning *t)
{
    return t ? td_tune_untuned(t->chooser) : 0;
}

int td_tuning_untuned_text(const td_tuning *t, size_t i, char *text, size_t n)
{
    td_tune_key k = *td_tune_untuned_at(t->chooser, i);
    k.rows = 0;
    td_tune_key_text(&k, text, n);
    for (size_t j = 0; j < i; j++) {
        td_tune_key before = *td_tune_untuned_at(t->chooser, j);
        before.rows = 0;
        if (memcmp(&before, &k, sizeof k) == 0)
            return 0;
    }
    return 1;
}

void td_tuning_close(td_tuning *t)
{
    if (!t)
        return;
    td_gpu_backend_tuned(NULL);
    td_tune_chooser_free(t->chooser);
    td_tuned_free(t->table);
    free(t);
}
